"""What leaves a row that is too long: exemplars, then the end of its context, and never its question or options."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtune.encoding.fit import fit
from mmtune.encoding.refused import Refused
from mmtune.records import Medium, Message, TextPart

CONTEXT = "one two\n three  four five\tsix seven"
ASKED = "Who sings?\nOPTIONS:\n- a bird\n- a boy"


class WordCounter:
    """Encodes a word as a token."""

    def encode(self, messages, tools):
        count = len(" ".join(message.text for message in messages).split())
        return SimpleNamespace(input_ids=np.zeros(count), media=())


def turns(text: str, train: bool = True) -> tuple[Message, ...]:
    return (
        Message("user", (Medium("image", "a.png"), TextPart(text))),
        Message("assistant", (TextPart("a bird"),), train=train),
    )


def fitted(messages, most: int, context: str = CONTEXT, ranks=()):
    return fit(WordCounter(), messages, "", most, drop_turns=False, ranks=ranks, context=context)


@given(st.integers(1, 25))
def test_a_context_keeps_as_many_of_its_first_words_as_fit(most: int):
    messages = turns(f"Read: {CONTEXT}\n{ASKED}")
    whole = len(f"Read: {CONTEXT}\n{ASKED} a bird".split())
    if most < whole - 6:
        with pytest.raises(Refused, match="max_length"):
            fitted(messages, most)
        return
    made = fitted(messages, most)
    words = min(7, 7 - (whole - most))
    assert made.row.input_ids.size == min(most, whole)
    assert made.context == (None if most >= whole else " ".join(CONTEXT.split()[:words]))
    before, after = made.messages[0].text.split("\nWho")
    # What stays is as it was, with its own line breaks.
    assert f"Read: {CONTEXT}".startswith(before) and before.split()[1:] == CONTEXT.split()[:words]
    assert f"Who{after}" == ASKED and made.messages[1] == messages[1]
    assert made.messages[0].media == messages[0].media


def test_exemplars_leave_before_the_context_does():
    shown = turns("Read: a b\nWho?", train=False)
    messages = (*shown, *turns(f"Read: {CONTEXT}\n{ASKED}"))
    whole = len(" ".join(message.text for message in messages).split())
    assert fitted(messages, whole, ranks=(0,)).dropped == 0
    fewer = fitted(messages, whole - 1, ranks=(0,))
    assert (fewer.dropped, fewer.context) == (1, None)
    least = fitted(messages, 17, ranks=(0,))
    assert (least.dropped, least.context) == (1, "one two three four five")


@pytest.mark.parametrize("context", ["", "nowhere", "one"])
def test_what_is_no_context_of_its_own_is_not_cut(context: str):
    with pytest.raises(Refused):
        fitted(turns(f"Read: {CONTEXT} one\n{ASKED}"), 17, context)
