"""A split of tokens/ as the loop sees it: sizes of the trees, and batches of their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from mmtune.encoding.tree import Tree, row_to_tree, tree_rows
from mmtune.training.packing import Packing
from mmtune.training.plan import TreeSizes
from mmtune.training.tree_batch import TreeCollator

Trees = Sequence[int] | np.ndarray


def tree_sizes(table: pa.Table) -> TreeSizes:
    """Returns the sizes of every tree, read column-wise in bounded pieces."""
    rows, longest, targets = [], [], []
    for batch in table.select(["labels", "branch"]).to_batches(max_chunksize=4096):
        branch, bounds = _flat(batch.column(1))
        labels, _ = _flat(batch.column(0))
        for first, last in pairwise(bounds):
            counts = np.bincount(branch[first:last])
            prefix = int(counts[0]) if counts.size else 0
            rows.append(counts.size - 1)
            longest.append(prefix + int(counts[1:].max(initial=0)))
            targets.append(int((labels[first:last] != -100).sum()))
    return TreeSizes(np.asarray(rows), np.asarray(longest), np.asarray(targets))


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


class TreeBatches:
    """Tree indices to padded batches.

    Args:
        table: A split of tokens/.
        collate: Rows and the training step, if there is one, to a padded batch of tensors.
    """

    def __init__(self, table: pa.Table, collate: Callable[[list[Any], int | None], dict[str, Any]]) -> None:
        self._collate = collate
        chunks = table.to_batches()
        self._starts = np.cumsum([0, *(chunk.num_rows for chunk in chunks)])
        self._chunks = [
            {name: _cells(column) for name, column in zip(chunk.schema.names, chunk.columns, strict=True)}
            for chunk in chunks
        ]

    def _cell(self, index: int, name: str) -> Any:
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._chunks[chunk][name](index - int(self._starts[chunk]))

    def _row(self, index: int) -> dict[str, Any]:
        return {name: self._cell(index, name) for name in self._chunks[0]}

    def trees(self, trees: Trees) -> list[Tree]:
        """Returns some trees."""
        return [row_to_tree(self._row(int(index))) for index in trees]

    def batch(self, trees: Trees, step: int | None = None) -> dict[str, Any]:
        """Returns the padded batch of all rows of some trees, as it is at a training step."""
        return self._collate([row for tree in self.trees(trees) for row in tree_rows(tree)], step)

    def ids(self, trees: Trees) -> list[str]:
        """Returns the example ids in some trees."""
        return [example for index in trees for example in self._cell(int(index), "example_ids")]

    def modalities(self, trees: Trees) -> set[str]:
        """Returns the kinds of media in some trees: ``image``, ``video``, ``audio``."""
        return {medium["modality"] for index in trees for medium in self._cell(int(index), "media")}


@dataclass(frozen=True)
class PackedBatches:
    """Tree indices to batches of packed trees.

    Attributes:
        source: The split.
        packing: Of the same split.
        collate: Bins of trees to tensors.
    """

    source: TreeBatches
    packing: Packing
    collate: TreeCollator

    def batch(self, trees: Trees, step: int | None = None) -> dict[str, Any]:
        """Returns the packed batch of a micro batch of ``packing.epoch_batches``, as it is at a training step."""
        return self.collate([self.source.trees(members) for members in self.packing.split(np.asarray(trees))], step)
