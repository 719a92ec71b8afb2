"""The policy's samples and gradients against counting and finite differences."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from mmtune.prompts.search.policy import entropy, fresh_policy, gradient, greedy, log_probability, sample

V, P, D = 5, 3, 4


def policy(hidden, top_k=0, noise=0.7):
    rng = np.random.default_rng(3)
    fresh = fresh_policy(rng.normal(size=(V, D)), length=P, hidden=hidden, top_k=top_k, seed=1)
    weights = {name: value + noise * rng.normal(size=value.shape) for name, value in fresh.weights.items()}
    return replace(fresh, weights=weights)


def everything():
    return np.array(list(itertools.product(range(V), repeat=P)))


@pytest.mark.parametrize(("hidden", "top_k"), [(0, 0), (6, 0), (0, 2), (6, 3)])
def test_the_gradient_is_that_of_finite_differences(hidden, top_k):
    given = policy(hidden, top_k)
    ids_CP = sample(given, 7, np.random.default_rng(0))
    weight_C = np.random.default_rng(1).normal(size=7)

    def value(weights):
        moved = replace(given, weights=weights)
        return float(weight_C @ log_probability(moved, ids_CP)) + 0.3 * entropy(moved, ids_CP)

    slope = gradient(given, ids_CP, weight_C, 0.3)
    assert slope.keys() == given.weights.keys()
    for name, weight in given.weights.items():
        for at in np.ndindex(weight.shape):
            step = np.zeros_like(weight)
            step[at] = 1e-5
            up = value({**given.weights, name: weight + step})
            down = value({**given.weights, name: weight - step})
            assert slope[name][at] == pytest.approx((up - down) / 2e-5, abs=1e-6), (name, at)


@pytest.mark.parametrize("hidden", [0, 6])
def test_probabilities_sum_to_one_and_the_fresh_policy_is_uniform(hidden):
    assert np.exp(log_probability(policy(hidden), everything())).sum() == pytest.approx(1.0)
    fresh = policy(hidden, noise=0.0)
    assert log_probability(fresh, everything()) == pytest.approx(np.full(V**P, -P * np.log(V)))


def test_samples_come_as_often_as_their_probability_says():
    given = policy(6, top_k=3)
    drawn = sample(given, 20_000, np.random.default_rng(2))
    counts = np.bincount(np.ravel_multi_index(drawn.T, (V,) * P), minlength=V**P) / len(drawn)
    expected = np.exp(log_probability(given, everything()))
    assert (expected == 0).any() and not counts[expected == 0].any()
    assert np.abs(counts - expected).max() < 0.015


def test_top_k_one_draws_what_greedy_takes():
    given = policy(6, top_k=1)
    assert (sample(given, 4, np.random.default_rng(0)) == greedy(given)).all()


def test_words_of_one_embedding_are_alike_to_the_mlp():
    embedding_VD = np.array([[1.0, 0], [1.0, 0], [-1.0, 0.5], [0, -1.0]])
    fresh = fresh_policy(embedding_VD, length=2, hidden=8, top_k=0, seed=0)
    slope = gradient(fresh, np.array([[0, 2]]), np.array([1.0]), 0.0)
    moved = {name: value + (0 if name == "place_PV" else slope[name]) for name, value in fresh.weights.items()}
    after = log_probability(replace(fresh, weights=moved), np.array([[0, 2], [1, 2], [3, 2]]))
    assert after[0] == pytest.approx(after[1]) and after[1] > after[2]
