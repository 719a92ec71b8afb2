"""Rows that begin alike as tries: every distinct beginning stands once, however often and deep they fork.

The options of a question share the question, the questions of a medium share the medium, and rows of one
instruction share that. A token tree has one prefix and plain branches; a trie forks wherever rows part. Ids are
compared literally, so sharing never changes one, and a medium is the same only if it is the same file in the
same place. Shapes: R rows, T tokens, N labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmtune.encoding.render import IGNORED, EncodedRow, MediaSpan

Joins = Callable[[int, int, int], bool]
"""``(tokens of the trie, tokens of the next row, tokens it would share)`` to whether the row goes in."""


@dataclass(frozen=True, slots=True)
class Trie:
    """Some rows in the order of their ids; each adds what it does not share with the one before it.

    Attributes:
        input_ids: ``(T,)``.
        places: ``(T,)`` each token's place on the path from the start of its row.
        ends: ``(T,)``; token q sees token k where ``k <= q < ends[k]``.
        prompt: ``(T,)`` where no label of the token's row has come yet.
        media: Distinct spans by position in ``input_ids``.
        rows: ``(R,)`` numbers of the rows.
        starts: ``(R + 1,)`` where what each row adds begins.
        shared: ``(R,)`` how many tokens it shares with the row before it.
        asks: ``(N,)`` the token that predicts each label.
        targets: ``(N,)`` the labels.
        owners: ``(N,)`` number of the label's row.
    """

    input_ids: np.ndarray
    places: np.ndarray
    ends: np.ndarray
    prompt: np.ndarray
    media: tuple[MediaSpan, ...]
    rows: np.ndarray
    starts: np.ndarray
    shared: np.ndarray
    asks: np.ndarray
    targets: np.ndarray
    owners: np.ndarray

    def paths(self) -> Iterator[tuple[np.ndarray, int]]:
        """Yields where each row's tokens stand, in order, and how many of them it shares with the row before it."""
        path = np.empty(0, dtype=np.int64)
        for at, shared in enumerate(self.shared):
            path = np.concatenate([path[:shared], np.arange(self.starts[at], self.starts[at + 1])])
            yield path, int(shared)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A row up to the token that predicts its last label.

    Attributes:
        number: Of the row.
        keys: ``(T,)`` ids, those of a medium replaced by the medium's number.
        first: Place of the first label.
    """

    number: int
    row: EncodedRow
    keys: np.ndarray
    first: int


def build_tries(rows: Sequence[EncodedRow], joins: Joins, *, whole_prompts: bool = False) -> list[Trie]:
    """Returns the tries of some rows; rows without a label are in none.

    Args:
        rows: With labels; the first token of a row is none.
        joins: Decides where a new trie begins.
        whole_prompts: Share a prompt only with rows that have the same to its end, for a model that reads
            it in both directions.
    """
    media: dict[Any, int] = {}
    asked = sorted(
        (one for number, row in enumerate(rows) if (one := _asked(number, row, media)) is not None),
        # Numbers of equal width with the highest byte first sort as the tuples do, and faster.
        key=lambda one: one.keys.astype(">u8").tobytes(),
    )
    tries: list[Trie] = []
    members: list[_Asked] = []
    shared: list[int] = []
    total = 0
    for one in asked:
        common = _common(members[-1], one, whole_prompts) if members else 0
        if members and not joins(total, one.keys.size, common):
            tries.append(_trie(members, shared))
            members, shared, total, common = [], [], 0, 0
        members.append(one)
        shared.append(common)
        total += one.keys.size - common
    return [*tries, _trie(members, shared)] if members else tries


def _asked(number: int, row: EncodedRow, media: dict[Any, int]) -> _Asked | None:
    bears = np.flatnonzero(row.labels != IGNORED)
    bears = bears[bears > 0]
    if not bears.size:
        return None
    length = int(bears[-1])
    keys = row.input_ids[:length].astype(np.int64)
    for span in row.media:
        if span.start < length:
            inside = row.input_ids[span.start : span.start + span.length]
            medium = (span.medium.modality, span.medium.path, span.medium.data, span.frame, span.frames)
            name = (*medium, inside.tobytes())
            keys[span.start : span.start + span.length] = (1 << 40) + media.setdefault(name, len(media))
    return _Asked(number, row, keys, int(bears[0]))


def _common(one: _Asked, other: _Asked, whole_prompts: bool) -> int:
    length = min(one.keys.size, other.keys.size)
    differs = np.flatnonzero(one.keys[:length] != other.keys[:length])
    common = int(differs[0]) if differs.size else length
    if whole_prompts and not (one.first == other.first <= common):
        return 0
    return common


def _trie(members: Sequence[_Asked], shared: Sequence[int]) -> Trie:
    sizes = [one.keys.size - common for one, common in zip(members, shared, strict=True)]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    places, ends = np.empty(starts[-1], dtype=np.int64), np.full(starts[-1], starts[-1])
    prompt = np.empty(starts[-1], dtype=bool)
    media: list[MediaSpan] = []
    asks, targets, owners = [], [], []
    path = np.empty(0, dtype=np.int64)
    for at, (one, common) in enumerate(zip(members, shared, strict=True)):
        # Nothing sees the rest of the row before this one any more.
        ends[path[common:]] = starts[at]
        own = np.arange(starts[at], starts[at + 1])
        path = np.concatenate([path[:common], own])
        places[own] = np.arange(common, one.keys.size)
        prompt[own] = places[own] < one.first
        moved = int(starts[at]) - common
        media += [
            replace(span, start=span.start + moved) for span in one.row.media if common <= span.start < one.keys.size
        ]
        bears = np.flatnonzero(one.row.labels[1:] != IGNORED)
        asks.append(path[bears])
        targets.append(one.row.labels[1:][bears])
        owners.append(np.full(bears.size, one.number))
    return Trie(
        np.concatenate(
            [one.row.input_ids[common : one.keys.size] for one, common in zip(members, shared, strict=True)]
        ),
        places,
        ends,
        prompt,
        tuple(media),
        np.array([one.number for one in members]),
        starts,
        np.array(shared),
        np.concatenate(asks),
        np.concatenate(targets),
        np.concatenate(owners),
    )
