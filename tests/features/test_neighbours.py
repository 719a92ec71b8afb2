"""Nearest vectors against brute force in float64; ties by row; what cannot be compared is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.errors import DataError
from mmtune.features.neighbours import nearest


def brute(pool, queries, k, metric):
    """The definition, one pair after the other, in float64."""
    pool, queries = pool.astype(np.float64), queries.astype(np.float64)
    if metric == "cosine":
        pool, queries = (
            (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-300)).astype(np.float32).astype(np.float64)
            for v in (pool, queries)
        )
    rows, values = [], []
    for query in queries:
        own = ((pool - query) ** 2).sum(1) if metric == "l2" else -(pool @ query)
        order = np.lexsort((np.arange(len(pool)), own))[:k]
        rows.append(order)
        values.append(own[order] if metric == "l2" else -own[order])
    return np.array(rows), np.array(values)


@pytest.mark.parametrize("metric", ["cosine", "inner_product", "l2"])
@pytest.mark.parametrize("shape", [(5000, 700, 24, 10), (9000, 3, 8, 1), (7, 5, 3, 20)])
def test_nearest_is_brute_force(metric, shape):
    count, asked, width, k = shape
    rng = np.random.default_rng(count)
    pool, queries = (rng.normal(size=(n, width)).astype(np.float32) * 3 for n in (count, asked))
    rows, values = nearest(pool, queries, k, metric)
    expected, distances = brute(pool, queries, k, metric)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(values, distances, atol=1e-6, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["inner_product", "l2"]), st.integers(1, 12))
def test_equal_vectors_are_ordered_by_row(seed, metric, k):
    # Small whole numbers: many exact ties, which neither float32 nor float64 rounds.
    rng = np.random.default_rng(seed)
    pool, queries = rng.integers(-1, 2, (200, 4)), rng.integers(-1, 2, (9, 4))
    rows, _ = nearest(pool, queries, k, metric)
    np.testing.assert_array_equal(rows, brute(pool, queries, k, metric)[0])


def test_the_result_does_not_depend_on_who_is_asked_together():
    rng = np.random.default_rng(0)
    pool = np.repeat(rng.normal(size=(3000, 16)).astype(np.float32), 2, axis=0)
    queries = rng.normal(size=(600, 16)).astype(np.float32)
    rows, values = nearest(pool, queries, 5)
    for at in (0, 511, 512, 599):
        alone = nearest(pool, queries[at : at + 1], 5)
        np.testing.assert_array_equal(alone[0][0], rows[at])
        np.testing.assert_array_equal(alone[1][0], values[at])


def test_a_zero_vector_is_like_nothing_and_an_empty_pool_has_no_neighbours():
    rows, values = nearest(np.array([[0, 0], [1, 0], [-1, 0]]), np.array([[2.0, 0]]), 3)
    assert rows.tolist() == [[1, 0, 2]] and values.tolist() == [[1, 0, -1]]
    assert nearest(np.empty((0, 2)), np.array([[2.0, 0]]), 3)[0].shape == (1, 0)


@pytest.mark.parametrize(
    ("pool", "queries", "words"),
    [
        ([[1, np.nan]], [[1, 1]], "pool: row 0"),
        ([[1, 1]], [[1, 1], [np.inf, 0]], "queries: row 1"),
        ([[1, 1, 1]], [[1, 1]], "2 numbers wide, the pool is 3"),
        ([1, 1], [[1, 1]], r"shape \(2,\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(pool, queries, words):
    with pytest.raises(DataError, match=words):
        nearest(np.array(pool, float), np.array(queries, float), 1)
