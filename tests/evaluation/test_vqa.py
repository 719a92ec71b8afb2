"""VQA accuracy: the official scorer's own numbers, hand-derived cases, then properties."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtune.evaluation.vqa import VqaQuestion, normalise, score_vqa, vqa_accuracy

# Prediction, ten answers, and the accuracy worked out by hand.
BY_HAND = [
    # All ten agree: nothing is normalised, so a capital and a period cost everything...
    ("Yes.", ["yes"] * 10, 0.0),
    # ...but line breaks and outer spaces are always cleaned.
    (" yes\n", ["yes"] * 10, 100.0),
    # Three matches: 2/3 against the sets that miss one of them, 1 against the other seven.
    ("red", ["red"] * 3 + ["blue"] * 7, 90.0),
    # One match: 0 once, 1/3 nine times. "two" is "2", and the last period goes.
    ("2.", ["two"] + ["three"] * 9, 30.0),
    # Two matches: 1/3 twice, 2/3 eight times. Article dropped, apostrophe put back.
    ("The dont", ["don't"] * 2 + ["stop"] * 8, 60.0),
    # A comma between digits makes every mark of that text vanish.
    ("1000", ["1,000"] * 9 + ["1000"], 100.0),
    # A period before a digit stays, one before anything else goes.
    ("3.5.", ["3.5"] * 9 + ["4"], 100.0),
    # A slash becomes a space, and vanishes where a space already stands beside it.
    ("black / white", ["black/white"] * 5 + ["black white"] * 5, 100.0),
]
texts = st.lists(st.sampled_from([*"ab1 2,.;/'-?!\n", "the ", "dont ", "two "]), max_size=12).map("".join)


@pytest.mark.parametrize(("prediction", "answers", "expected"), BY_HAND)
def test_by_hand(prediction, answers, expected):
    assert vqa_accuracy(prediction, answers) == pytest.approx(expected)


def test_oddities_of_the_official_script():
    assert normalise("it's 3.x") == "it's 3x"  # the look-behind of its pattern never looks behind
    assert normalise("a." * 40) == "a" * 32 + "a." * 8  # at most 32 periods go
    assert normalise("None of the ten") == "0 of 10"
    assert normalise("wouldnt've") == normalise("wouldn'tve") == "wouldn't've"
    assert normalise("somebody'd") == "somebodyd"
    assert normalise("x:y") == "x:y"


def test_equals_the_official_scorer(shared_datasets):
    folder = shared_datasets / "vqa_eval_oracle"
    items = json.loads((folder / "v2_mscoco_val2014_annotations.json").read_text())["annotations"]
    results = json.loads((folder / "v2_OpenEnded_mscoco_val2014_fake_results.json").read_text())
    questions = [
        VqaQuestion(
            item["question_id"],
            tuple(answer["answer"] for answer in item["answers"]),
            item["question_type"],
            item["answer_type"],
        )
        for item in items
    ]
    found = score_vqa({row["question_id"]: row["answer"] for row in results}, questions)
    expected = json.loads((folder / "expected_accuracy.json").read_text())
    per_question = json.loads((folder / "expected_per_question.json").read_text())
    assert {key: found[key] for key in expected} == expected
    assert {str(key): value for key, value in found["perQuestion"].items()} == per_question
    assert len(per_question) == 400


@given(texts, st.lists(texts, min_size=10, max_size=10), st.randoms())
def test_in_range_and_order_of_answers_does_not_matter(prediction, answers, chance):
    value = vqa_accuracy(prediction, answers)
    assert 0.0 <= value <= 100.0
    shuffled = list(answers)
    random.Random(chance.random()).shuffle(shuffled)
    assert vqa_accuracy(prediction, shuffled) == pytest.approx(value)


@given(st.integers(0, 10))
def test_value_follows_the_number_of_matches(matches):
    answers = ["x"] * matches + ["y"] * (10 - matches)
    without_one = min(1.0, max(matches - 1, 0) / 3)
    expected = 10 * (matches * without_one + (10 - matches) * min(1.0, matches / 3))
    assert vqa_accuracy("x", answers) == pytest.approx(expected)
