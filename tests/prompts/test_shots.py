"""Finished rows before a finished row: what may be shown of a training row, in which order, and what leaves first."""

from dataclasses import replace

import pytest

from mmtune.encoding.turns import without_farthest
from mmtune.prompts.shots import card_of, exchange, own_media, with_shots
from mmtune.prompts.template import Style, make_example
from mmtune.records import Medium, Record

VQA = Record(
    "s/1", "s", "vqa", "train", text="What is it?", media=(Medium("image", "1.jpg"),), references=("cat", "a cat")
)  # fmt: skip


def rows(count: int) -> list[Record]:
    return [replace(VQA, id=f"s/{at}", media=(Medium("image", f"{at}.jpg"),)) for at in range(count)]


def test_a_row_shows_its_own_question_and_answer_and_not_its_exemplars():
    made = make_example(rows(4)[0], exemplars=rows(4)[1:], system="Be brief.", order="nearest_last")
    turns = exchange(made)
    assert [turn.role for turn in turns] == ["user", "assistant"] and not turns[1].train
    assert [medium.path for turn in turns for medium in turn.media] == ["0.jpg"] == [m.path for m in own_media(made)]
    assert card_of(made).media == ("0.jpg",) and card_of(made).label == "cat"
    assert card_of(replace(made, id="s/0~2")).id == "s/0"


@pytest.mark.parametrize(
    "record",
    [
        replace(VQA, split="val", references=()),
        replace(VQA, task="sentiment_analysis", media=(), text="fine", options=("cat", "dog"), rationale="so."),
    ],
    ids=["no answer", "reasons first"],
)
def test_some_rows_are_no_exemplars(record: Record):
    assert exchange(make_example(record, style=Style(rationale=True))) == ()
    conversation = make_example(replace(VQA, messages=make_example(VQA).messages, text="", media=()))
    assert exchange(conversation) == ()


def test_a_row_asked_the_other_way_round_is_no_exemplar():
    record = Record(
        "s/2", "s", "sentiment_analysis", "train", text="Fine.", references=("good",), options=("bad", "good")
    )
    turned = make_example(record, style=Style(inverted=True))
    assert turned.references == ("Fine.",) and exchange(turned) == ()
    assert exchange(make_example(record))


def test_exemplars_stand_between_system_turn_and_question_and_the_farthest_leaves_first():
    asked = make_example(replace(VQA, split="val", id="s/9", media=(Medium("image", "9.jpg"),)), system="Be brief.")
    exemplars = [make_example(row) for row in rows(3)]
    for order, shown, ranks in (
        ("nearest_first", ["0", "1", "2"], (0, 1, 2)),
        ("nearest_last", ["2", "1", "0"], (2, 1, 0)),
    ):
        made = with_shots(asked, exemplars, order, "salt")
        assert made.messages[0].role == "system" and made.exemplar_ids == tuple(f"s/{at}" for at in shown)
        assert [medium.path for medium in made.media] == [*(f"{at}.jpg" for at in shown), "9.jpg"]
        assert [m.train for m in made.messages if m.role == "assistant"] == [False, False, False, True]
        assert own_media(made) == asked.media and card_of(made) == card_of(asked)
        messages, left = made.messages, ranks
        for gone in ("2", "1", "0"):
            found = without_farthest(messages, left)
            assert found is not None
            before = {medium.path for message in messages for medium in message.media}
            messages, left = found
            assert before - {medium.path for message in messages for medium in message.media} == {f"{gone}.jpg"}
        assert messages == asked.messages and left == () and without_farthest(messages, left) is None
