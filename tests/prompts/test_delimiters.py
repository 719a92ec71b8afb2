"""Delimiters: exemplars as text of one turn, drawn per row, and nothing of a row lost on the way."""

import math
from collections import Counter
from dataclasses import replace

import pytest

from mmtune.prompts.delimiters import DELIMITERS, FORMS, delimited, joined
from mmtune.records import Example, Medium, Message, SoftPart, TextPart


def turn(role: str, *parts, train: bool = True) -> Message:
    return Message(role, tuple(TextPart(part) if isinstance(part, str) else part for part in parts), train=train)


def solved(question: str, answer: str, *media: Medium) -> list[Message]:
    return [turn("user", *media, question), turn("assistant", answer, train=False)]


def row(at: int = 0, *turns: Message) -> Example:
    own = (turn("user", "own?"), turn("assistant", "yes"))
    made = Example(f"s/{at}", "s", "vqa", "train", (*turns, *own), ("yes",), "accuracy", exemplar_ids=("s/7",))
    return replace(made, template_id="t")


TWO = (turn("system", "Be brief."), *solved("one?", "1"), *solved("two?", "2"), turn("user", "own?"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("one_line", "one? 1\ntwo? 2\nown?"),
        ("arrow", "one? -> 1\ntwo? -> 2\nown? ->"),
        ("blank_line", "one?\n1\n\ntwo?\n2\n\nown?"),
        ("blank_lines", "one?\n\n1\n\n\n\ntwo?\n\n2\n\n\n\nown?"),
        ("rule", "one?\n1\n---\ntwo?\n2\n---\nown?"),
        ("letters", "Q: one?\nA: 1\n\nQ: two?\nA: 2\n\nQ: own?\nA:"),
        ("words", "Question: one?\nAnswer: 1\n\n\nQuestion: two?\nAnswer: 2\n\n\nQuestion: own?\nAnswer:"),
        ("input_output", "Input: one?\nOutput: 1\n###\nInput: two?\nOutput: 2\n###\nInput: own?\nOutput:"),
    ],
)
def test_exemplars_become_text_of_one_turn(name: str, text: str):
    answer = turn("assistant", "3")
    assert joined((*TWO, answer), name) == (TWO[0], turn("user", text), answer)
    # Val rows and prompts end with their question.
    assert joined(TWO, name) == (TWO[0], turn("user", text))
    assert set(FORMS) == {"one_line", "arrow", "blank_line", "blank_lines", "rule", "letters", "words", "input_output"}


def test_media_stay_where_their_questions_show_them():
    first, own = Medium("image", "a.png"), Medium("image", "b.png")
    turns = (*solved("how many?", "4", first), turn("user", own, "and here?"), turn("assistant", "5"))
    asked, answer = joined(turns, "letters")
    assert answer == turns[-1]
    assert asked.parts == (
        TextPart("Q: "),
        first,
        TextPart("how many?\nA: 4\n\nQ: "),
        own,
        TextPart("and here?\nA:"),
    )


def test_what_has_no_exemplar_or_no_delimiters_is_as_it_was():
    plain = (turn("user", "own?"), turn("assistant", "yes"))
    assert joined(plain, "letters") == plain
    assert joined(TWO, None) is TWO


def test_the_draw_is_by_seed_and_id_and_every_form_comes():
    n, share = 4_000, 0.6
    rows = [row(at, *solved("one?", "1")) for at in range(n)]
    drawn = [delimited(one, share, 3).metadata.get(DELIMITERS) for one in rows]
    assert drawn == [delimited(one, share, 3).metadata.get(DELIMITERS) for one in rows]
    assert drawn != [delimited(one, share, 4).metadata.get(DELIMITERS) for one in rows]
    counts = Counter(drawn)

    def near(count: int, part: float) -> bool:
        return abs(count - part * n) <= 4 * math.sqrt(n * part * (1 - part))

    assert near(counts.pop(None), 1 - share)
    assert set(counts) == set(FORMS) and all(near(count, share / len(FORMS)) for count in counts.values())
    # A larger share keeps what a smaller one drew.
    more = [delimited(one, 0.9, 3).metadata.get(DELIMITERS) for one in rows]
    assert all(late == early for early, late in zip(drawn, more, strict=True) if early is not None)


def test_rows_without_exemplars_conversations_and_rows_with_soft_tokens_stay_turns():
    talk = replace(row(0, *solved("one?", "1"), turn("user", "hello"), turn("assistant", "hi")), template_id="")
    assert delimited(talk, 1.0, 0) == talk
    assert delimited(replace(row(), exemplar_ids=()), 1.0, 0).metadata == {}
    soft = row(0, turn("user", SoftPart(4), "one?"), turn("assistant", "1", train=False))
    assert delimited(soft, 1.0, 0) == soft
    assert DELIMITERS in delimited(row(0, *solved("one?", "1")), 1.0, 0).metadata
