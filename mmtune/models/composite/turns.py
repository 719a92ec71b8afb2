"""The words of the user in a conversation's ids: found by the control tokens that the chat template puts around a turn.

The instruction that a model follows is what its user says, without the system's turn, the names of the roles, control
tokens and media. Ids alone tell it, so rows from disk, trees, tries and plain calls of a processor all tell the same.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_ASKED, _SAID = ("Words of one", "Words of two"), ("Reply of one", "Reply of two")
# What may follow a turn's opening: what the tokenizer joins with none of them is the opening's own.
_BEGINNINGS = ("a", "1", "\n\n", " ", "(")


@dataclass(frozen=True)
class UserTurns:
    """How turns of users begin and end.

    Attributes:
        opening: Ids that open one, the first of them a control token.
        behind: Ids that stand behind these, where the turn's first word is not joined with them.
        closing: The control token that ends one.
        control: Ids that are no words.
    """

    opening: tuple[int, ...]
    behind: tuple[int, ...]
    closing: int
    control: tuple[int, ...]

    def __call__(self, ids_T: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns ``(T,)`` int64: k at the words of the k-th user's turn, -k elsewhere from its opening up to the next.

        Before the first one it is 0. What a token is depends on nothing behind it.

        Args:
            ids_T: Of one conversation, or its beginning.
        """
        ids = np.asarray(ids_T, dtype=np.int64)
        size = len(self.opening)
        turns = np.zeros(ids.size, dtype=np.int64)
        if ids.size < size:
            return turns
        opens = np.all([ids[at : ids.size - size + 1 + at] == own for at, own in enumerate(self.opening)], axis=0)
        starts = np.flatnonzero(opens) + size
        turns[starts[starts < ids.size]] = 1
        turns = -np.cumsum(turns)
        ends = np.flatnonzero(ids == self.closing)
        for start in starts:
            first = start + _shared(ids[start:].tolist(), self.behind)
            after = ends[ends >= first]
            inside = slice(first, after[0] if after.size else ids.size)
            turns[inside] = np.where(np.isin(ids[inside], self.control), turns[inside], np.abs(turns[inside]))
        return turns


def user_turns_of(tokenizer: Any, template: str) -> UserTurns | None:
    """Returns how the turns of users are found; None where the template puts no control token at both their ends.

    Args:
        tokenizer: A fast tokenizer.
        template: The chat template, which takes lists of parts.
    """
    from jinja2 import TemplateError

    talk = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for pair in zip(_ASKED, _SAID, strict=True)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    try:
        shown = str(tokenizer.apply_chat_template(talk, chat_template=template, tokenize=False))
    except (TemplateError, TypeError, ValueError, AttributeError):
        # A template for strings, or for other roles.
        return None
    if any(shown.count(text) != 1 for text in (*_ASKED, *_SAID)):
        return None
    (first, second), control = _ASKED, _control_ids(tokenizer, template)
    heads = shown[: shown.index(first)], shown[shown.index(_SAID[0]) + len(_SAID[0]) : shown.index(second)]
    opening = heads[0][len(heads[0]) - _shared(heads[0][::-1], heads[1][::-1]) :]
    closing = _first(_ids(tokenizer, shown[shown.index(second) + len(second) : shown.index(_SAID[1])]), control)
    usual = _ids(tokenizer, opening)
    joined = min(_shared(usual, _ids(tokenizer, opening + one)) for one in _BEGINNINGS)
    # What closes the turn before is no part of it.
    begin = max((at + 1 for at, one in enumerate(usual) if one == closing), default=0)
    begin += next((at for at, one in enumerate(usual[begin:joined]) if one in control), joined)
    if closing is None or begin >= joined:
        return None
    found = UserTurns(tuple(usual[begin:joined]), tuple(usual[joined:]), closing, tuple(sorted(control)))
    ids = np.array(_ids(tokenizer, shown))
    turns = found(ids)
    said = [str(tokenizer.decode(ids[turns == number])).strip() for number in (1, 2)]
    return found if said == list(_ASKED) and turns.max() == len(_ASKED) else None


def _control_ids(tokenizer: Any, template: str) -> set[int]:
    """Returns the ids that are no words: special tokens and those of the template, but the one for unknown letters."""
    structural = {
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.content.strip() and (token.special or token.content in template)
    }
    return {*structural, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _first(ids: Sequence[int], wanted: set[int]) -> int | None:
    return next((one for one in ids if one in wanted), None)


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Returns how many of their first elements two sequences share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))
