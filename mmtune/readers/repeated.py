"""Rows whose id stands twice, found in eight bytes a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmtune.errors import DataError
from mmtune.readers.limit import item_hash
from mmtune.records import Record, Reject

_RECENT = 200_000
_MOST_ARRAYS = 6


class SeenIds:
    """Which 64-bit hashes have been seen: a small set, and sorted arrays for the older ones."""

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._sorted: list[Any] = []

    def repeated(self, hashes: Sequence[int]) -> list[bool]:
        """Returns, per hash, whether it was seen before (here or in an earlier call); adds them all."""
        old = np.zeros(len(hashes), bool)
        wanted = np.array(hashes, np.uint64)
        for known in self._sorted:
            at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
            old |= known[at] == wanted
        out = []
        for value, found in zip(hashes, old, strict=True):
            out.append(bool(found) or value in self._recent)
            self._recent.add(value)
        if len(self._recent) >= _RECENT:
            self._sorted.append(np.sort(np.fromiter(self._recent, np.uint64, len(self._recent))))
            self._recent = set()
            if len(self._sorted) > _MOST_ARRAYS:
                self._sorted = [np.unique(np.concatenate(self._sorted))]
        return out


def drop_repeated(items: Sequence[Record | Reject], seen: SeenIds, policy: str) -> tuple[Record | Reject, ...]:
    """Returns the items with every record of a known id replaced by its Reject.

    Raises:
        DataError: There is one and ``policy`` is ``error`` (``duplicate_id``).
    """
    again = iter(seen.repeated([item_hash(item) for item in items if isinstance(item, Record)]))
    out: list[Record | Reject] = []
    for item in items:
        if isinstance(item, Record) and next(again):
            if policy == "error":
                raise DataError(
                    f"the id {item.id!r} stands twice (again at {item.where})",
                    "give the rows, or their sources, ids of their own; build.dedup: first keeps only the first",
                    "duplicate_id",
                )
            out.append(Reject(item.where, item.id, "duplicate_id", "the first row of this id is kept"))
        else:
            out.append(item)
    return tuple(out)
