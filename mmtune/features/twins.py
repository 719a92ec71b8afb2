"""Near twins: what is held out, and lies so near to a training unit that it may be the same thing in another file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmtune.features.neighbours import nearest
from mmtune.features.table import FeatureTable

_ROUNDING = 1e-6
"""A copy's cosine in float32 may be so much below 1."""


@dataclass(frozen=True, slots=True)
class Twin:
    """A held-out unit and the training unit next to it.

    Attributes:
        id: The held-out one.
        splits: Its splits.
        train: Id of the training unit.
        cosine: Of their pooled vectors.
    """

    id: str
    splits: tuple[str, ...]
    train: str
    cosine: float


@dataclass(frozen=True)
class Twins:
    """What was found among the units of one kind.

    Attributes:
        found: The nearest first.
        asked: Split to its units that are no training units.
        shared: Split to its units that are training units themselves.
        median: Middle of the cosines of all of them to the nearest training unit; None where nothing was compared.
    """

    found: tuple[Twin, ...]
    asked: Counter[str]
    shared: Counter[str]
    median: float | None

    def facts(self) -> dict[str, Any]:
        """Returns what the manifest says of them."""
        twins = Counter(split for twin in self.found for split in twin.splits)
        splits = {split: {"units": count, "twins": twins[split]} for split, count in sorted(self.asked.items())}
        return {"splits": splits, "median_cosine": None if self.median is None else round(self.median, 4)}


def near_twins(table: FeatureTable, least: float) -> Twins:
    """Returns the held-out units whose nearest training unit is near.

    A unit that is in train itself is no twin: build-data counts what splits share.

    Args:
        table: Features of one kind.
        least: Least cosine of pooled vectors.

    Raises:
        DataError: A vector holds no finite numbers.
    """
    splits = table.table.column("splits").to_pylist()
    trained = np.array(["train" in own for own in splits], bool)
    held = np.flatnonzero(~trained)
    asked = Counter(split for row in held for split in splits[row])
    pool = np.flatnonzero(trained)
    shared = Counter(split for row in pool for split in splits[row] if split != "train")
    if not held.size or not pool.size:
        return Twins((), asked, shared, None)
    vectors = table.pooled()
    rows, cosines = nearest(vectors[pool], vectors[held], 1)
    found = [
        Twin(table.ids[own], tuple(splits[own]), table.ids[pool[row]], float(cosine))
        for own, row, cosine in zip(held, rows[:, 0], cosines[:, 0], strict=True)
        if cosine >= least - _ROUNDING
    ]
    return Twins(tuple(sorted(found, key=lambda twin: -twin.cosine)), asked, shared, float(np.median(cosines)))
