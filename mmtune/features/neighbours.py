"""The nearest vectors of a pool, exactly: what every index is measured against.

A pass in float32 finds who may be near, float64 decides: rank and value do not depend on how the pass was cut, and
equal values are ordered by row.

Shapes: P pool, Q queries, D width, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mmtune.errors import DataError

Metric = Literal["cosine", "inner_product", "l2"]
Vectors = NDArray[np.float32]
# Rows of queries and pool whose values are looked at together: eight MiB, of which a core's cache holds most.
_QUERIES, _POOL = 512, 4096
# Pairs per wanted neighbour from which on the worse ones are dropped.
_FULL = 6
# Pairs that are measured in float64 at once.
_PAIRS = 1 << 16


def prepared(vectors: NDArray[np.floating], metric: Metric, what: str) -> Vectors:
    """Returns vectors ``(P, D)`` in float32 as they are compared: of length 1 under ``cosine``, a zero vector as it is.

    Raises:
        DataError: One holds something that is no finite number (``bad_vector``).
    """
    made = np.ascontiguousarray(vectors, np.float32)
    if made.ndim != 2:
        raise DataError(f"{what}: expected vectors (rows, width), found the shape {made.shape}", "", "bad_vector")
    bad = np.flatnonzero(~np.isfinite(made).all(axis=1))
    if bad.size:
        raise DataError(f"{what}: row {bad[0]} holds no finite numbers", "extract again, in fp32", "bad_vector")
    if metric != "cosine":
        return made
    norms = np.linalg.norm(made.astype(np.float64), axis=1, keepdims=True)
    return (made / np.where(norms > 0, norms, 1)).astype(np.float32)


def nearest(
    pool: NDArray[np.floating], queries: NDArray[np.floating], k: int, metric: Metric = "cosine"
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns rows and values ``(Q, min(k, P))`` of the nearest, the nearest first and equal ones by row.

    A value is the cosine, the inner product, or the squared L2 distance.

    Args:
        pool: ``(P, D)``.
        queries: ``(Q, D)``.
        k: How many are wanted.
        metric: How they are compared.

    Raises:
        DataError: Widths differ, or a vector holds no finite numbers.
    """
    return search_prepared(prepared(pool, metric, "pool"), prepared(queries, metric, "queries"), k, metric)


def search_prepared(
    pool: Vectors, queries: Vectors, k: int, metric: Metric
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns what ``nearest`` does, for vectors that ``prepared`` made."""
    check_widths(pool.shape[1], queries.shape[1])
    k = min(k, len(pool))
    rows = np.empty((len(queries), k), np.int64)
    values = np.empty((len(queries), k), np.float64)
    if not k:
        return rows, values
    squares = np.einsum("pd,pd->p", pool, pool) if metric == "l2" else None
    longest = float(np.sqrt(np.einsum("pd,pd->p", pool, pool, dtype=np.float64).max()))
    for start in range(0, len(queries), _QUERIES):
        own = slice(start, start + _QUERIES)
        near = _candidates(pool, queries[own], k, squares, longest)
        rows[own], values[own] = _ranked(pool, queries[own], near, k, metric)
    return rows, values


def check_widths(pool: int, queries: int) -> None:
    """Raises DataError unless queries are as wide as the pool."""
    if pool != queries:
        raise DataError(
            f"queries are {queries} numbers wide, the pool is {pool}",
            "make both with the same encoder and the same pooling",
            "width_mismatch",
        )


@dataclass(frozen=True)
class _Pairs:
    """Queries, rows of the pool and float32 scores that belong together, in the order of the queries."""

    query: NDArray[np.int64]
    row: NDArray[np.int64]
    score: Vectors

    def best(self, queries: int, k: int, slack: Vectors, bar: Vectors) -> tuple[_Pairs, Vectors]:
        """Returns the pairs that may be among the k best of their query, and the bar for those to come."""
        order = np.lexsort((-self.score, self.query))
        query, row, score = self.query[order], self.row[order], self.score[order]
        first = np.searchsorted(query, np.arange(queries + 1))
        full = np.flatnonzero(np.diff(first) >= k)
        bar = bar.copy()
        bar[full] = score[first[full] + k - 1] - slack[full]
        near = score >= bar[query]
        return _Pairs(query[near], row[near], score[near]), bar


def _candidates(pool: Vectors, queries: Vectors, k: int, squares: Vectors | None, longest: float) -> _Pairs:
    """Returns the pairs that may be nearest, more of them where values are close."""
    # Rounding in float32 errs by at most about D units in the last place of the product of the lengths.
    norms = np.sqrt(np.einsum("qd,qd->q", queries, queries, dtype=np.float64))
    scale = longest * (norms if squares is None else norms + longest)
    slack = (4 * (pool.shape[1] + 4) * np.finfo(np.float32).eps * scale).astype(np.float32)
    bar = np.full(len(queries), -np.inf, np.float32)
    kept = _Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    for start in range(0, len(pool), _POOL):
        part = queries @ pool[start : start + _POOL].T
        if squares is not None:
            part -= squares[start : start + _POOL] / 2
        if not start and part.shape[1] > k:
            bar = np.partition(part, part.shape[1] - k, axis=1)[:, part.shape[1] - k] - slack
        flat = np.flatnonzero(part >= bar[:, None])
        query, row = np.divmod(flat, part.shape[1])
        kept = _Pairs(
            np.concatenate([kept.query, query]),
            np.concatenate([kept.row, row + start]),
            np.concatenate([kept.score, part.ravel()[flat]]),
        )
        if kept.row.size > _FULL * k * len(queries) or start + _POOL >= len(pool):
            kept, bar = kept.best(len(queries), k, slack, bar)
    return kept


def _ranked(
    pool: Vectors, queries: Vectors, near: _Pairs, k: int, metric: Metric
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns the k best pairs of every query by their values in float64, equal ones by row."""
    values = np.empty(near.row.size, np.float64)
    for start in range(0, near.row.size, _PAIRS):
        own = slice(start, start + _PAIRS)
        left, right = queries[near.query[own]].astype(np.float64), pool[near.row[own]].astype(np.float64)
        if metric == "l2":
            left = right = left - right
        values[own] = np.einsum("nd,nd->n", left, right)
    order = np.lexsort((near.row, values if metric == "l2" else -values, near.query))
    first = np.searchsorted(near.query[order], np.arange(len(queries)))
    chosen = order[first[:, None] + np.arange(k)]
    return near.row[chosen], values[chosen]
