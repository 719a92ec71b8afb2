"""Intervals cover, tests keep their level, and rows of one picture count as one."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.evaluation.intervals import bootstrap, holm, paired_difference, sign_flip_p, sign_test

scores = st.lists(st.sampled_from([0.0, 30.0, 60.0, 90.0, 100.0]), min_size=1, max_size=30)


def test_several_tests_together():
    """The textbook's example: each p-value times the tests that are left, never below the one before."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@settings(max_examples=40)
@given(scores, st.integers(0, 5))
def test_interval_holds_the_mean_and_is_repeatable(values, seed):
    found = bootstrap(values, resamples=100, seed=seed)
    assert found.low <= found.value <= found.high
    assert found.low >= 0.0 and found.high <= 100.0
    assert found.value == pytest.approx(np.mean(values))
    assert found == bootstrap(values, resamples=100, seed=seed)


@settings(max_examples=30)
@given(scores, st.randoms(use_true_random=False))
def test_order_of_rows_does_not_matter_with_groups(values, chance):
    groups = [f"picture {index // 2}" for index in range(len(values))]
    order = list(range(len(values)))
    chance.shuffle(order)
    first = bootstrap(values, groups=groups, resamples=100)
    second = bootstrap([values[at] for at in order], groups=[groups[at] for at in order], resamples=100)
    assert (first.low, first.high) == pytest.approx((second.low, second.high))


def test_interval_has_the_textbook_width_and_coverage():
    generator = np.random.default_rng(0)
    values = 100.0 * (generator.random(2000) < 0.3)
    found = bootstrap(values, resamples=2000)
    wanted = 1.96 * values.std() / math.sqrt(values.size)
    assert (found.high - found.low) / 2 == pytest.approx(wanted, rel=0.08)
    covered = 0
    for seed in range(200):
        sample = 100.0 * (np.random.default_rng([7, seed]).random(120) < 0.3)
        one = bootstrap(sample, resamples=300, seed=seed)
        covered += one.low <= 30.0 <= one.high
    assert 0.89 <= covered / 200 <= 0.99


def test_rows_of_one_picture_widen_the_interval():
    generator = np.random.default_rng(1)
    by_picture = np.repeat(100.0 * (generator.random(200) < 0.5), 5)
    groups = [str(index // 5) for index in range(1000)]
    apart, together = bootstrap(by_picture), bootstrap(by_picture, groups=groups)
    assert together.groups == 200 and apart.groups == 1000
    ratio = (together.high - together.low) / (apart.high - apart.low)
    assert ratio == pytest.approx(math.sqrt(5), rel=0.15)


def test_weights_make_a_ratio():
    assert bootstrap([100.0, 200.0], weights=[1.0, 5.0]).value == pytest.approx(50.0)


def test_paired_difference_sees_a_gain_and_not_noise():
    generator = np.random.default_rng(2)
    base = 100.0 * (generator.random(400) < 0.5)
    better = np.where(generator.random(400) < 0.2, 100.0, base)
    gain = paired_difference(base, better)
    assert gain.low > 0 and gain.p < 0.01 and gain.p_sign < 0.01
    assert gain.wins > 0 and gain.losses == 0 and gain.wins + gain.ties == 400
    mirrored = paired_difference(better, base)
    assert (mirrored.value, mirrored.low, mirrored.high) == pytest.approx((-gain.value, -gain.high, -gain.low))
    assert mirrored.p == pytest.approx(gain.p) and mirrored.losses == gain.wins
    same = paired_difference(base, base)
    assert same.value == 0 and same.p == 1.0 and same.p_sign == 1.0
    assert paired_difference(base, better, higher_is_better=False).losses == gain.wins


def test_paired_test_keeps_its_level():
    found = []
    for seed in range(300):
        generator = np.random.default_rng([11, seed])
        base, other = (100.0 * (generator.random(60) < 0.4) for _ in range(2))
        found.append(paired_difference(base, other, resamples=200, seed=seed).p)
    assert np.mean(np.asarray(found) < 0.05) < 0.085


@given(st.integers(0, 12), st.integers(0, 12))
def test_sign_test_is_the_binomial_sum(wins, losses):
    n, k = wins + losses, min(wins, losses)
    exact = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0
    assert sign_test(wins, losses) == pytest.approx(exact)


@settings(max_examples=30)
@given(st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=7))
def test_few_groups_get_the_exact_p(parts):
    patterns = [
        abs(sum(sign * part for sign, part in zip(signs, parts, strict=True)))
        for signs in product((-1, 1), repeat=len(parts))
    ]
    exact = np.mean([value >= abs(sum(parts)) - 1e-9 for value in patterns])
    assert sign_flip_p(np.asarray(parts), 1000, 0) == pytest.approx(exact)


def test_no_rows_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        bootstrap([])
    with pytest.raises(ValueError, match="same rows"):
        paired_difference([1.0], [1.0, 2.0])
