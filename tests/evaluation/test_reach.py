"""What is said where answers and options do not meet."""

import pytest

from mmtune.evaluation.comparison import ScoredRow
from mmtune.evaluation.reach import beside_options


def row(number, options=("yes", "no")):
    return ScoredRow(str(number), "s", "label", str(number), ("accuracy",), ("yes",), options)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (["maybe", "No.", "a dog"], "2 of 3 answers of tuned to rows with options are none of these"),
        (["maybe", "No.", "YES"], ""),
    ],
)
def test_answers_that_are_mostly_no_option_are_told(answers, said):
    rows = [*map(row, range(3)), row(3, options=())]
    notes = beside_options(rows, {"base": ["x"] * 4, "tuned": [*answers, "free"]})
    assert len(notes) == bool(said) and (not said or (notes[0].startswith(said) and "eval.answer: rank" in notes[0]))


def test_without_options_nothing_is_said():
    assert beside_options([row(0, options=())], {"tuned": ["x"]}) == beside_options([row(0)], {}) == []
