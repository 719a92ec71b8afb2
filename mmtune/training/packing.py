"""Which trees share a row of the batch: best-fit decreasing over a whole split.

A tree's cost counts in tokens. A tree that is heavy in another way (media tokens, which stand
for the tower's work, or rows) costs as many tokens as its share of that budget, so one number
per tree keeps every budget of a bin.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from mmtune.training.plan import order

if TYPE_CHECKING:
    import pyarrow as pa


_KINDS = {"image": 1, "video": 2, "audio": 4, "behaviour": 8}


@dataclass(frozen=True)
class TreeLengths:
    """Per tree: tokens laid out as a tree, media tokens among them, and rows.

    Attributes:
        tokens: ``(n,)``.
        media: ``(n,)``.
        rows: ``(n,)`` branches.
    """

    tokens: np.ndarray
    media: np.ndarray
    rows: np.ndarray


def tree_lengths(table: pa.Table) -> TreeLengths:
    """Returns the lengths of every tree in a split of tokens/, read column-wise in bounded pieces."""
    tokens, media, rows = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for batch in table.select(["length", "media", "example_ids"]).to_batches(max_chunksize=4096):
        tokens.append(batch.column(0).to_numpy().astype(np.int64))
        ends = batch.column(1).offsets.to_numpy()
        spans = batch.column(1).values.field("length").to_numpy()
        media.append(np.diff(np.concatenate([[0], np.cumsum(spans, dtype=np.int64)])[ends]))
        rows.append(np.diff(batch.column(2).offsets.to_numpy()).astype(np.int64))
    return TreeLengths(np.concatenate(tokens), np.concatenate(media), np.concatenate(rows))


def tree_modalities(table: pa.Table) -> np.ndarray:
    """Returns ``(n,)`` a number for the set of media kinds in each tree; 0 is text alone."""
    found = [np.empty(0, np.int64)]
    for batch in table.select(["media"]).to_batches(max_chunksize=4096):
        column = batch.column(0)
        kinds = np.asarray([_KINDS[name] for name in column.flatten().field("modality").to_pylist()], dtype=np.int64)
        sets = np.zeros(batch.num_rows, dtype=np.int64)
        np.bitwise_or.at(sets, np.repeat(np.arange(batch.num_rows), np.diff(column.offsets.to_numpy())), kinds)
        found.append(sets)
    return np.concatenate(found)


def tree_costs(lengths: TreeLengths, capacity: int, *, media: int | None = None, rows: int | None = None) -> np.ndarray:
    """Returns ``(n,)`` the tokens that each tree takes of a bin.

    Args:
        lengths: Of the trees.
        capacity: Tokens of a bin.
        media: Most media tokens of a bin, or None.
        rows: Most rows of a bin, or None.

    A tree that is over the media or row budget by itself takes a whole bin.
    """
    costs = lengths.tokens
    for counts, budget in ((lengths.media, media), (lengths.rows, rows)):
        if budget is not None:
            costs = np.maximum(costs, np.minimum(-(-counts * capacity // budget), capacity))
    return costs


def pack(costs: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Returns bins of indices: best-fit decreasing, a pure function of the costs.

    Bins stand in the order they were opened, indices in the order they were placed; what costs
    more than ``capacity`` stands alone.
    """
    bins: list[list[int]] = []
    rooms: list[int] = []
    with_room: dict[int, list[int]] = {}
    for index in np.argsort(-costs, kind="stable"):
        cost = int(costs[index])
        at = bisect_left(rooms, cost)
        if at == len(rooms):
            number, room = len(bins), max(capacity, cost)
            bins.append([])
        else:
            room = rooms[at]
            number = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        bins[number].append(int(index))
        left = room - cost
        if left not in with_room:
            with_room[left] = []
            insort(rooms, left)
        with_room[left].append(number)
    return [np.asarray(members) for members in bins]


@dataclass(frozen=True)
class Packing:
    """A split packed into bins; one bin is one row of a batch.

    Attributes:
        costs: ``(n,)`` tokens that each tree takes.
        lengths: Of the trees.
        capacity: Tokens of a bin.
        seed: Seed of the order.
    """

    costs: np.ndarray
    lengths: TreeLengths
    capacity: int
    seed: int

    def bins(self, epoch: int) -> list[np.ndarray]:
        """Returns an epoch's bins as opened; trees of equal cost change places between epochs."""
        shuffled = order(self.seed, epoch, self.costs.size)
        return [shuffled[members] for members in pack(self.costs[shuffled], self.capacity)]

    def epoch_batches(
        self, epoch: int, *, batch_tokens: int, batch_rows: int | None = None, batch_media_tokens: int | None = None
    ) -> list[np.ndarray]:
        """Returns the micro batches of an epoch, each the trees of one or more bins, in a shuffled order.

        Args:
            epoch: Counts from zero.
            batch_tokens: Most tokens of a micro batch, padding included.
            batch_rows: Most rows of a micro batch, or None; a bin with more stands alone.
            batch_media_tokens: Most media tokens, in the same way.
        """
        bins = self.bins(epoch)
        shuffled = np.random.default_rng([self.seed, epoch]).permutation(len(bins))
        # A bin counts as one, whatever its tokens: it is padded.
        weights = [np.array([1, *self._heft(bins[number])[1:]]) for number in shuffled]
        most = _most(max(batch_tokens // self.capacity, 1), batch_rows, batch_media_tokens)
        return [
            np.concatenate([bins[number] for number in sorted(shuffled[own])]) for own in _consecutive(weights, most)
        ]

    def cut(
        self,
        trees: np.ndarray,
        *,
        batch_tokens: int,
        batch_rows: int | None = None,
        batch_media_tokens: int | None = None,
    ) -> list[np.ndarray]:
        """Returns a micro batch of ``epoch_batches`` as smaller ones, bin by bin and, where a bin is too much, tree
        by tree; limits as there.
        """
        parts = []
        most = _most(batch_tokens, batch_rows, batch_media_tokens)
        bins = self.split(trees)
        padded = max(int(self.lengths.tokens[members].sum()) for members in bins)
        weights = [np.array([padded, *self._heft(members)[1:]]) for members in bins]
        for own in _consecutive(weights, most):
            members = np.concatenate(bins[own])
            if len(bins[own]) == 1 and (weights[own.start] > most).any():
                parts += [members[few] for few in _consecutive([self._heft(tree) for tree in members], most)]
            else:
                parts.append(members)
        return parts

    def _heft(self, trees: np.ndarray) -> np.ndarray:
        """Returns tokens, rows and media tokens of some trees."""
        lengths = self.lengths
        return np.array([lengths.tokens[trees].sum(), lengths.rows[trees].sum(), lengths.media[trees].sum()])

    def split(self, trees: np.ndarray) -> list[np.ndarray]:
        """Returns the bins of a micro batch of ``epoch_batches``.

        Bins stand in the order they were opened, and a bin is opened when its first tree fits no
        earlier one. So filling row after row in that order finds the same bins again.
        """
        starts, room = [0], self.capacity
        for at, cost in enumerate(self.costs[trees]):
            if cost > room and at > starts[-1]:
                starts.append(at)
                room = self.capacity
            room -= int(cost)
        return [trees[first:last] for first, last in pairwise([*starts, trees.size])]


def _most(first: int, batch_rows: int | None, batch_media_tokens: int | None) -> np.ndarray:
    return np.array([first, *(np.inf if one is None else one for one in (batch_rows, batch_media_tokens))])


def _consecutive(weights: Sequence[np.ndarray], most: np.ndarray) -> list[slice]:
    """Returns runs of items, each as long as the sum of its weights is within ``most``; one over it stands alone."""
    runs, start = [], 0
    held = np.zeros_like(most)
    for at, weight in enumerate(weights):
        if at > start and (held + weight > most).any():
            runs.append(slice(start, at))
            start, held = at, np.zeros_like(most)
        held = held + weight
    return [*runs, slice(start, len(weights))] if weights else runs
