"""Pooled vectors as shorter ones: how they are made comparable, the best linear way, and how much any way loses.

Shapes: R rows, K kinds, D width of a kind's vectors or of all kinds side by side, C width of a code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmtune.errors import DataError, RecipeError

Numbers = NDArray[np.float64]
_CONSTANT = 1e-6
"""Share of a vector's size below which its changes are rounding, of vectors in fp32."""


@dataclass(frozen=True)
class Standard:
    """Vectors of rows by kind, about the mean of the training rows and in units of their spread.

    Every kind has variance 1 over its training rows, all numbers of a vector together, so that none of large numbers
    or of many rules the others.

    Attributes:
        vectors: Kind to ``(R, D)``; zeros, which are the mean, where a row lacks the kind.
        present: ``(R, K)``, what a row has, in the order of ``vectors``.
        train: ``(R,)``, the rows that a reduction is fitted on.
    """

    vectors: Mapping[str, Numbers]
    present: NDArray[np.bool_]
    train: NDArray[np.bool_]

    @property
    def whole(self) -> Numbers:
        """``(R, D)``, the kinds side by side."""
        return np.concatenate(list(self.vectors.values()), axis=1)


def standardized(
    vectors: Mapping[str, NDArray[np.floating]], present: NDArray[np.bool_], train: NDArray[np.bool_], what: str
) -> Standard:
    """Returns vectors about their mean and in units of their spread.

    Args:
        vectors: Kind to ``(R, D)``.
        present: ``(R, K)``.
        train: ``(R,)``.
        what: Whose vectors, for errors.

    Raises:
        DataError: No row is of train (``no_train_rows``), a vector holds no finite numbers (``bad_vector``), or all
            training rows are alike (``constant_features``).
    """
    if not train.any():
        raise DataError(
            f"extract.reduce: no {what} are of the split train, which the reduction is fitted on",
            "give a source `split: train`, or leave them out with extract.reduce.of",
            "no_train_rows",
        )
    made = {}
    for (kind, own), has in zip(vectors.items(), present.T, strict=True):
        bad = np.flatnonzero(has & ~np.isfinite(own).all(axis=1))
        if bad.size:
            raise DataError(
                f"extract.reduce: the {kind} of row {bad[0]} of {what} has no finite numbers",
                "extract again, in fp32",
                "bad_vector",
            )
        known = own[train & has].astype(np.float64)
        mean = known.mean(axis=0) if len(known) else np.zeros(own.shape[1])
        spread = float(np.sqrt(np.square(known - mean).sum() / max(len(known), 1)))
        if spread <= _CONSTANT * max(float(np.linalg.norm(mean)), 1.0):
            raise DataError(
                f"extract.reduce: the training vectors of {kind} ({len(known):,}) are all the same; nothing is to keep",
                f"check the sources and the encoder, or leave {kind} out of extract.reduce.of and extract.joint",
                "constant_features",
            )
        made[kind] = np.where(has[:, None], (own - mean) / spread, 0.0)
    return Standard(made, present, train)


def fit_pca(standard: Standard, width: int, what: str) -> Numbers:
    """Returns the best linear code of the training rows, orthonormal ``(D, C)``: their first principal directions.

    By the singular values of the triangular factor of the rows, which are those of the rows. A direction points to
    where its largest number is positive.

    Args:
        standard: The vectors.
        width: C.
        what: Whose vectors, for errors.

    Raises:
        RecipeError: The code is not shorter than the vectors (``reduce_too_wide``).
        DataError: The training rows span fewer directions (``reduce_too_wide``).
    """
    whole = standard.whole
    rows, total = int(standard.train.sum()), whole.shape[1]
    if width >= total:
        raise RecipeError(
            f"extract.reduce.width: {width} is no reduction of the {what}, whose vectors are {total} numbers wide",
            f"choose a width below {total}",
            "reduce_too_wide",
        )
    _, sizes, directions = np.linalg.svd(np.linalg.qr(whole[standard.train], mode="r"), full_matrices=False)
    spanned = int((sizes > sizes[0] * max(rows, total) * np.finfo(np.float32).eps).sum())
    if width > spanned:
        raise DataError(
            f"extract.reduce.width: {width} is more than {rows:,} training {what} span ({spanned} directions)",
            f"choose a width of at most {spanned}, or give more training rows",
            "reduce_too_wide",
        )
    chosen = directions[:width].T
    largest = np.abs(chosen).argmax(axis=0)
    return chosen * np.sign(chosen[largest, np.arange(width)])


def lost(standard: Standard, decoded: NDArray[np.floating]) -> dict[str, Any]:
    """Returns the share of the variance that codes lose on training and other rows; 1 is what the mean would lose.

    Args:
        standard: The vectors.
        decoded: ``(R, D)`` what the codes are decoded to, the kinds side by side.

    Returns:
        ``train`` and ``held_out`` (None without such rows), and of several kinds the same by kind under ``kinds``.
    """
    kinds: dict[str, dict[str, float | None]] = {}
    sums = np.zeros((2, 2))
    start = 0
    for (kind, own), has in zip(standard.vectors.items(), standard.present.T, strict=True):
        off = np.square(own - decoded[:, start : start + own.shape[1]]).sum(axis=1)
        size = np.square(own).sum(axis=1)
        start += own.shape[1]
        chosen = [standard.train & has, ~standard.train & has]
        pair = np.array([[off[rows].sum(), size[rows].sum()] for rows in chosen])
        sums += pair
        kinds[kind] = _shares(pair)
    return {**_shares(sums), **({"kinds": kinds} if len(kinds) > 1 else {})}


def _shares(sums: Numbers) -> dict[str, float | None]:
    pairs = zip(("train", "held_out"), sums.tolist(), strict=True)
    return {name: round(off / size, 6) if size else None for name, (off, size) in pairs}
