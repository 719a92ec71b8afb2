"""A split of tokens/ as the loop sees it: sizes, and batches of its rows or of its trees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmtune.choice import chosen
from mmtune.encoding.render import EncodedRow
from mmtune.encoding.tree import Tree, row_to_span, row_to_tree, some_branches, tree_rows, tree_to_row
from mmtune.features.shards import Item
from mmtune.records import READ_BY, SOFT_ID
from mmtune.training.packing import Packing
from mmtune.training.plan import TreeSizes
from mmtune.training.tree_batch import TreeCollator

Numbers = Sequence[int] | np.ndarray


def tree_sizes(table: pa.Table) -> TreeSizes:
    """Returns the sizes of every tree, read column-wise in bounded pieces."""
    parts = [
        (counts.size - 1, int(counts.sum()), int(targets.sum()), int(media.sum()))
        for counts, targets, media in _branches(table)
    ]
    return TreeSizes(*np.asarray(parts, dtype=np.int64).reshape(-1, 4).T)


def row_sizes(table: pa.Table) -> tuple[TreeSizes, np.ndarray]:
    """Returns the sizes of every separate row, and ``(n, 2)`` the tree and the branch, from 0, it comes from."""
    parts, at = [np.empty((4, 0), np.int64)], [np.empty((0, 2), np.int64)]
    for number, (counts, targets, media) in enumerate(_branches(table)):
        # Every row has the prefix; no label stands there.
        parts.append(np.stack([np.ones_like(counts), counts[0] + counts, targets, media[0] + media])[:, 1:])
        at.append(np.stack([np.full(counts.size - 1, number), np.arange(counts.size - 1)], axis=1))
    return TreeSizes(*np.concatenate(parts, axis=1)), np.concatenate(at)


def _branches(table: pa.Table) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields, per tree, the tokens, the labels and the media tokens of its prefix and of each branch."""
    for batch in table.select(["labels", "branch", "media"]).to_batches(max_chunksize=4096):
        branch, bounds = _flat(batch.column(1))
        labels, _ = _flat(batch.column(0))
        spans, ends = batch.column(2).values, batch.column(2).offsets.to_numpy()
        starts, lengths = (spans.field(name).to_numpy().astype(np.int64) for name in ("start", "length"))
        for (first, last), (one, end) in zip(pairwise(bounds), pairwise(ends), strict=True):
            own = branch[first:last]
            counts = np.bincount(own, minlength=1)
            targets = np.bincount(own[labels[first:last] != -100], minlength=counts.size)
            media = np.zeros_like(counts)
            np.add.at(media, own[starts[one:end]], lengths[one:end])
            yield counts, targets, media


def soft_token_count(table: pa.Table) -> int:
    """Returns how many soft tokens the rows of a split count up to; 0 without any."""
    ids = table.column("input_ids")
    highest = max((pc.max(chunk.values).as_py() or 0 for chunk in ids.chunks), default=0)
    return max(int(highest) - SOFT_ID + 1, 0)


def some_rows(table: pa.Table, limit: int) -> pa.Table:
    """Returns at most ``limit`` rows of a split, see ``choice``; a tree keeps the chosen branches."""
    column = table.column("example_ids")
    bounds = np.concatenate([[0], np.cumsum(pc.list_value_length(column).to_numpy())])
    if bounds[-1] <= limit:
        return table
    numbers = np.asarray(chosen(pc.list_flatten(column).to_pylist(), limit, "eval_rows"))
    owners = np.searchsorted(bounds, numbers, side="right") - 1
    found = Trees(table)
    kept = [
        tree_to_row(some_branches(found.trees([tree])[0], (numbers[owners == tree] - bounds[tree]).tolist()))
        for tree in np.unique(owners)
    ]
    return pa.Table.from_pylist(kept, table.schema)


def media_items(table: pa.Table, kind: str, token_id: int) -> Iterator[tuple[Item, int, int]]:
    """Yields every medium of a kind, as often as it stands in a split: item, tokens, rows of its tree that see it.

    Args:
        table: The split.
        kind: ``image``, video frames among them, ``audio`` or ``behaviour``.
        token_id: What stands for a piece of it.
    """
    for batch in table.select(["input_ids", "branch", "media", "example_ids"]).to_batches(max_chunksize=4096):
        ids, bounds = _flat(batch.column(0))
        branch, _ = _flat(batch.column(1))
        rows = np.diff(batch.column(3).offsets.to_numpy())
        before = np.concatenate([[0], np.cumsum(ids == token_id)])
        for number, spans in enumerate(batch.column(2).to_pylist()):
            for span in map(row_to_span, spans):
                if READ_BY[span.medium.modality] == kind:
                    first = bounds[number] + span.start
                    tokens = int(before[first + span.length] - before[first])
                    seen = 1 if branch[first] else int(rows[number])
                    yield Item(span.medium, span.frame, span.frames), tokens, seen


def _flat(column: Any) -> tuple[np.ndarray, np.ndarray]:
    offsets = column.offsets.to_numpy()
    values = column.values.to_numpy(zero_copy_only=False)
    return values, offsets


def _cells(column: pa.Array) -> Callable[[int], Any]:
    """Returns a function from row number to cell; lists of numbers are views of the file, never Python lists."""
    if pa.types.is_list(column.type) and pa.types.is_primitive(column.type.value_type):
        values, offsets = _flat(column)
        return lambda row: values[offsets[row] : offsets[row + 1]]
    return lambda row: column[row].as_py()


class Trees:
    """The trees of a split, read when they are asked for by number.

    Args:
        table: A split of tokens/.
    """

    def __init__(self, table: pa.Table) -> None:
        chunks = table.to_batches()
        self._starts = np.cumsum([0, *(chunk.num_rows for chunk in chunks)])
        self._chunks = [
            {name: _cells(column) for name, column in zip(chunk.schema.names, chunk.columns, strict=True)}
            for chunk in chunks
        ]

    def _cell(self, index: int, name: str) -> Any:
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._chunks[chunk][name](index - int(self._starts[chunk]))

    def trees(self, numbers: Numbers) -> list[Tree]:
        """Returns some trees."""
        names = self._chunks[0] if self._chunks else ()
        return [row_to_tree({name: self._cell(int(index), name) for name in names}) for index in numbers]

    def ids(self, number: int) -> list[str]:
        """Returns the example ids of a tree."""
        ids: list[str] = self._cell(number, "example_ids")
        return ids

    def modalities(self, number: int) -> set[str]:
        """Returns the kinds of media in a tree, such as ``image`` and ``video``."""
        return {medium["modality"] for medium in self._cell(number, "media")}


@dataclass(frozen=True)
class RowBatches:
    """Row numbers to batches of separate rows.

    Attributes:
        source: The split.
        at: ``(n, 2)`` tree and branch of every row.
        collate: Rows and the training step, if there is one, to a padded batch of tensors.
    """

    source: Trees
    at: np.ndarray
    collate: Callable[[list[Any], int | None], dict[str, Any]]

    def batch(self, rows: Numbers, step: int | None = None) -> dict[str, Any]:
        """Returns the padded batch of some rows, as it is at a training step."""
        return self.collate(self.encoded(rows), step)

    def encoded(self, rows: Numbers) -> list[EncodedRow]:
        """Returns some rows."""
        wanted = self.at[np.asarray(rows)]
        numbers = np.unique(wanted[:, 0])
        apart = {int(n): tree_rows(tree) for n, tree in zip(numbers, self.source.trees(numbers), strict=True)}
        return [apart[int(tree)][int(branch)] for tree, branch in wanted]

    def ids(self, rows: Numbers) -> list[str]:
        """Returns the example ids of some rows."""
        return [self.source.ids(int(tree))[int(branch)] for tree, branch in self.at[np.asarray(rows)]]

    def modalities(self, rows: Numbers) -> set[str]:
        """Returns the kinds of media in some rows."""
        return {span.medium.modality for row in self.encoded(rows) for span in row.media}


@dataclass(frozen=True)
class PackedBatches:
    """Tree numbers to batches of packed trees.

    Attributes:
        source: The split.
        packing: Of the same split.
        collate: Bins of trees to tensors.
    """

    source: Trees
    packing: Packing
    collate: TreeCollator

    def batch(self, trees: Numbers, step: int | None = None) -> dict[str, Any]:
        """Returns the packed batch of a micro batch of ``packing.epoch_batches``, as it is at a training step."""
        return self.collate([self.source.trees(members) for members in self.packing.split(np.asarray(trees))], step)

    def ids(self, trees: Numbers) -> list[str]:
        """Returns the example ids in some trees."""
        return [example for tree in trees for example in self.source.ids(int(tree))]

    def modalities(self, trees: Numbers) -> set[str]:
        """Returns the kinds of media in some trees."""
        return set().union(*(self.source.modalities(int(tree)) for tree in trees))
