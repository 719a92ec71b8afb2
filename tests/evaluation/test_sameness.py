"""A model that answers all rows alike is told, unless all rows want that answer."""

from mmtune.evaluation.comparison import ScoredRow
from mmtune.evaluation.sameness import alike


def rows(*references: str) -> list[ScoredRow]:
    return [
        ScoredRow(str(at), "s", "t", str(at), ("accuracy",), tuple(text.split("|")))
        for at, text in enumerate(references)
    ]


def test_one_answer_to_nearly_all_rows_is_told_with_how_many_want_it():
    wanted = rows(*["joy"] * 12, *["anger|fear"] * 6, "anger", "joy|anger")
    texts = {
        "base": ["anger "] * 19 + ["anger"],
        "tuned": ["joy"] * 19 + ["anger"],
        "good": ["joy"] * 12 + ["anger"] * 8,
    }
    assert alike(wanted, texts) == {
        "base": {"answer": "anger", "rows": 20, "among_references": 8},
        "tuned": {"answer": "joy", "rows": 19, "among_references": 13},
    }


def test_nothing_is_told_of_an_answer_that_all_rows_want_or_of_few_rows():
    assert alike(rows(*["no"] * 19, "yes"), {"tuned": ["no"] * 20}) == {}
    assert alike(rows(*["no"] * 18, "yes", "yes"), {"tuned": ["no"] * 20}) != {}
    assert alike(rows(*["yes", "no"] * 4, "no"), {"tuned": ["no"] * 9}) == {}
    assert alike([], {"tuned": []}) == {}
