"""How sure a score is: bootstrap intervals and paired tests that respect shared media.

Rows that show the same picture are not independent, so the unit that is resampled is the
group of rows with the same media, not the row; without groups every row is its own. A score
is a ratio ``sum(values) / sum(weights)``: weights are 1 for a mean, the reference's length for
an error rate, the number of tokens for a loss.

Shapes: N rows, G groups, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Numbers = Sequence[float] | np.ndarray

_CELLS = 4_000_000
"""Most numbers drawn at once, so that memory does not grow with rows times resamples."""
_FLIPS = 9999
_FEW_SIZES = 2000
"""Up to so many distinct sizes of a group's part, ``_FLIPS`` sign patterns are drawn."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95 % percentile bootstrap interval.

    Attributes:
        n: Rows behind it.
        groups: Independent groups of rows behind it.
    """

    value: float
    low: float
    high: float
    n: int
    groups: int


@dataclass(frozen=True, slots=True)
class Difference:
    """Second model minus first on the same rows.

    Attributes:
        value: Difference of the two scores.
        low: Lower end of its 95 % paired bootstrap interval.
        high: Upper end.
        p: Two-sided p-value of the paired sign-flip test, groups flipped as wholes.
        wins: Rows on which the second model is better.
        losses: Rows on which it is worse.
        ties: Rows on which both are equal.
        p_sign: Two-sided p-value of the exact sign test over groups; where every row is its own
            group and scores are right or wrong, this is the exact McNemar test.
        n: Rows.
    """

    value: float
    low: float
    high: float
    p: float
    wins: int
    losses: int
    ties: int
    p_sign: float
    n: int


def bootstrap(
    values: Numbers,
    *,
    weights: Numbers | None = None,
    groups: Sequence[str] | None = None,
    most: float = math.inf,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Returns ``sum(values) / sum(weights)`` and its interval.

    Args:
        values: ``(N,)`` one per row; not empty.
        weights: ``(N,)``, 1 each when not given.
        groups: ``(N,)`` names; equal names are resampled together.
        most: No score is above it, so no end of the interval is.
        resamples: Number of bootstrap samples.
        seed: The same seed gives the same interval.
    """
    values_N, weights_N = _arrays(values, weights)
    sums_G2 = _per_group(np.stack([values_N, weights_N], axis=1), groups)
    value = _ratio(values_N.sum(), weights_N.sum())
    drawn_R2 = _resampled(sums_G2, resamples, seed)
    low, high = _percentiles(np.minimum(_ratios(drawn_R2[:, 0], drawn_R2[:, 1], value), most), value)
    return Interval(value, low, high, values_N.size, len(sums_G2))


def holm(values: Sequence[float]) -> list[float]:
    """Returns p-values that hold for all tests together (Holm 1979), in the order of the given ones."""
    order = sorted(range(len(values)), key=lambda at: values[at])
    out, least = [0.0] * len(values), 0.0
    for rank, at in enumerate(order):
        least = max(least, min(1.0, values[at] * (len(values) - rank)))
        out[at] = least
    return out


def paired_difference(
    first: Numbers,
    second: Numbers,
    *,
    first_weights: Numbers | None = None,
    second_weights: Numbers | None = None,
    groups: Sequence[str] | None = None,
    higher_is_better: bool = True,
    resamples: int = 1000,
    seed: int = 0,
) -> Difference:
    """Returns the second score minus the first over the same rows, its interval and tests.

    The interval resamples groups; the p-value flips the sign of whole groups at random, which
    is valid however few groups there are and however scores are distributed.
    """
    first_N, first_weights_N = _arrays(first, first_weights)
    second_N, second_weights_N = _arrays(second, second_weights)
    if first_N.size != second_N.size:
        raise ValueError(f"{first_N.size} rows against {second_N.size}: a paired test needs the same rows")
    columns = np.stack([first_N, first_weights_N, second_N, second_weights_N], axis=1)
    sums_G4 = _per_group(columns, groups)
    before = _ratio(first_N.sum(), first_weights_N.sum())
    value = _ratio(second_N.sum(), second_weights_N.sum()) - before
    drawn_R4 = _resampled(sums_G4, resamples, seed)
    differences_R = _ratios(drawn_R4[:, 2], drawn_R4[:, 3], before + value) - _ratios(
        drawn_R4[:, 0], drawn_R4[:, 1], before
    )
    low, high = _percentiles(differences_R, value)
    # Each group's part in the difference of the two ratios.
    parts_G = sums_G4[:, 2] / (second_weights_N.sum() or 1.0) - sums_G4[:, 0] / (first_weights_N.sum() or 1.0)
    sign = 1.0 if higher_is_better else -1.0
    better_N = sign * (second_N * first_weights_N - first_N * second_weights_N)
    return Difference(
        value=value,
        low=low,
        high=high,
        p=sign_flip_p(parts_G, resamples, seed),
        wins=int((better_N > 1e-9).sum()),
        losses=int((better_N < -1e-9).sum()),
        ties=int((np.abs(better_N) <= 1e-9).sum()),
        p_sign=sign_test(int((parts_G > 1e-12).sum()), int((parts_G < -1e-12).sum())),
        n=first_N.size,
    )


def sign_flip_p(parts: np.ndarray, resamples: int, seed: int) -> float:
    """Returns the two-sided p-value of a sum under random signs of its parts.

    Every sign pattern is tried where there are fewer of them than resamples.
    """
    parts_G = parts[parts != 0]
    observed = abs(parts_G.sum())
    if not parts_G.size:
        return 1.0
    slack = 1e-9 * np.abs(parts_G).sum()
    if parts_G.size < 20 and 2**parts_G.size <= resamples:
        patterns = (np.arange(2**parts_G.size)[:, None] >> np.arange(parts_G.size)) & 1
        return float(np.mean(np.abs((2 * patterns - 1) @ parts_G) >= observed - slack))
    # Parts of equal size (most scores take few values) flip as one binomial number.
    scale = np.abs(parts_G).max()
    sizes_V, counts_V = np.unique(np.round(np.abs(parts_G) / scale, 10), return_counts=True)
    flips = max(resamples, _FLIPS) if sizes_V.size <= _FEW_SIZES else resamples
    generator = np.random.default_rng([seed, 1])
    extreme = 0
    for size in _chunks(flips, sizes_V.size):
        positive = generator.binomial(counts_V, 0.5, size=(size, sizes_V.size))
        sums = (2 * positive - counts_V) @ sizes_V * scale
        extreme += int((np.abs(sums) >= observed - slack).sum())
    return (extreme + 1) / (flips + 1)


def sign_test(wins: int, losses: int) -> float:
    """Returns the exact two-sided binomial p-value of wins against losses; ties are left out."""
    n, k = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2.0 * math.fsum(map(math.exp, logs)))


def _arrays(values: Numbers, weights: Numbers | None) -> tuple[np.ndarray, np.ndarray]:
    values_N = np.asarray(values, dtype=np.float64)
    if values_N.ndim != 1 or not values_N.size:
        raise ValueError("a score needs at least one row")
    weights_N = np.ones_like(values_N) if weights is None else np.asarray(weights, dtype=np.float64)
    if weights_N.shape != values_N.shape:
        raise ValueError(f"{values_N.size} values but {weights_N.size} weights")
    return values_N, weights_N


def _per_group(columns_NC: np.ndarray, groups: Sequence[str] | None) -> np.ndarray:
    """Returns the sums of every group, ``(G, C)``, in an order that the rows' order does not change."""
    if groups is None:
        return columns_NC
    names, index = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    return np.stack([np.bincount(index, column, len(names)) for column in columns_NC.T], axis=1)


def _chunks(total: int, width: int) -> list[int]:
    step = max(1, _CELLS // max(width, 1))
    return [min(step, total - start) for start in range(0, total, step)]


def _resampled(sums_GC: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Returns the column sums of every bootstrap sample of groups, ``(R, C)``."""
    generator = np.random.default_rng([seed, 0])
    count = len(sums_GC)
    drawn = []
    for size in _chunks(resamples, count):
        picks = generator.integers(0, count, size=(size, count))
        # How often each group was drawn: one matrix product then sums all columns.
        offsets = picks + (np.arange(size) * count)[:, None]
        times = np.bincount(offsets.ravel(), minlength=size * count).reshape(size, count)
        drawn.append(times @ sums_GC)
    return np.concatenate(drawn)


def _ratio(value: float, weight: float) -> float:
    return float(value / weight) if weight else 0.0


def _ratios(values_R: np.ndarray, weights_R: np.ndarray, fallback: float) -> np.ndarray:
    return np.divide(values_R, weights_R, out=np.full_like(values_R, fallback), where=weights_R != 0)


def _percentiles(drawn_R: np.ndarray, value: float) -> tuple[float, float]:
    low, high = np.percentile(drawn_R, [2.5, 97.5])
    return min(float(low), value), max(float(high), value)
