"""One vector for all that a row shows: its picture and its words, or a chart's picture and the table behind it.

``features/joint`` opens with ``datasets.load_from_disk``. Columns: ``id`` (sha256 of its parts), ``where`` (the first
row that shows them together), ``parts`` (``kind/id`` of each), ``splits``, ``pooled`` (float32) and, with a reduction,
``reduced``.

Shapes: R rows, K kinds, D width of a kind's pooled vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmtune.features.neighbours import prepared
from mmtune.features.table import REDUCED, FeatureTable, vector_column
from mmtune.features.units import JointRow

if TYPE_CHECKING:
    import pyarrow as pa

JOINT = "joint"
"""The folder of joint features, beside those of the kinds."""


@dataclass(frozen=True)
class Joint:
    """What rows are in the features of several kinds.

    Attributes:
        rows: Those that have a feature of any kind.
        vectors: Kind to ``(R, D)``, the mean over a row's units of it; zeros where there is none.
        present: ``(R, K)``, whether there is one.
    """

    rows: tuple[JointRow, ...]
    vectors: Mapping[str, NDArray[np.float32]]
    present: NDArray[np.bool_]

    @property
    def pooled(self) -> NDArray[np.float32]:
        """``(R, sum of D)``: the kinds' vectors at length 1 side by side, so that each weighs the same."""
        parts = [prepared(own, "cosine", f"the features of {kind}") for kind, own in self.vectors.items()]
        return np.concatenate(parts, axis=1)


def joined(rows: Sequence[JointRow], tables: Mapping[str, FeatureTable]) -> Joint:
    """Returns the vectors of rows by kind; rows of which nothing has features are left out.

    Args:
        rows: Their units.
        tables: The features of every kind.
    """
    vectors: dict[str, NDArray[np.float32]] = {}
    counts = np.zeros((len(rows), len(tables)), np.int64)
    for column, (kind, table) in enumerate(tables.items()):
        places = [
            (at, place)
            for at, row in enumerate(rows)
            for own, name in row.parts
            if own == kind and (place := table.row_of(name)) is not None
        ]
        owners, units = np.array(places, np.int64).reshape(-1, 2).T
        pool = table.pooled()
        total = np.zeros((len(rows), pool.shape[1]), np.float64)
        np.add.at(total, owners, pool[units])
        counts[:, column] = np.bincount(owners, minlength=len(rows))
        vectors[kind] = (total / np.maximum(counts[:, column], 1)[:, None]).astype(np.float32)
    kept: NDArray[np.bool_] = counts.sum(axis=1) > 0
    some = tuple(row for row, has in zip(rows, kept, strict=True) if has)
    return Joint(some, {kind: own[kept] for kind, own in vectors.items()}, counts[kept] > 0)


def joint_table(joint: Joint, reduced: NDArray[np.float32] | None) -> pa.Table:
    """Returns joint features as the table of the folder.

    Args:
        joint: The rows.
        reduced: ``(R, C)`` codes, or None.
    """
    import pyarrow as pa

    text, lists = pa.string(), pa.list_(pa.string())
    columns = {
        "id": pa.array([row.id for row in joint.rows], text),
        "where": pa.array([row.where for row in joint.rows], text),
        "parts": pa.array([[f"{kind}/{name}" for kind, name in row.parts] for row in joint.rows], lists),
        "splits": pa.array([list(row.splits) for row in joint.rows], lists),
        "pooled": vector_column(joint.pooled),
    }
    return pa.table(columns if reduced is None else {**columns, REDUCED: vector_column(reduced)})
