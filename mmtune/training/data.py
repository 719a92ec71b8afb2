"""A split of tokens/ as the loop sees it: sizes of the trees, and batches of their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from mmtune.encoding.tree import row_to_tree, tree_rows
from mmtune.training.plan import TreeSizes

if TYPE_CHECKING:
    import pyarrow as pa


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


class TreeBatches:
    """Tree indices to padded batches; picklable for loader processes.

    Args:
        table: A split of tokens/.
        collate: Rows to a padded batch of tensors.
    """

    def __init__(self, table: pa.Table, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self._table, self._collate = table, collate
        self._starts = np.cumsum([0, *(chunk.num_rows for chunk in table.to_batches())])
        self._chunks = table.to_batches()

    def _row(self, index: int) -> dict[str, Any]:
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._chunks[chunk].slice(index - int(self._starts[chunk]), 1).to_pylist()[0]

    def batch(self, trees: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """Returns the padded batch of all rows of some trees."""
        return self._collate([row for index in trees for row in tree_rows(row_to_tree(self._row(int(index))))])

    def ids(self, trees: Sequence[int] | np.ndarray) -> list[str]:
        """Returns the example ids in some trees."""
        return [example for index in trees for example in self._row(int(index))["example_ids"]]
