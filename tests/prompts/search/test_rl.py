"""The search by reinforcement against exhaustive search, and what it must never do."""

import itertools

import numpy as np
import pytest

from mmtune.errors import DivergedError
from mmtune.prompts.search.rl import RlSettings, draw_group, fresh_learner, learn, search_words

WORDS, LENGTH, ROWS = 12, 2, 16


def landscape(seed):
    """Rewards of all prompts of two words: words matter by themselves, in their place, and by their company."""
    rng = np.random.default_rng(seed)
    alone, first, second = (rng.normal(size=(WORDS, ROWS)) for _ in range(3))
    company = rng.normal(size=(WORDS, WORDS, ROWS))
    prompts = list(itertools.product(range(WORDS), repeat=LENGTH))
    logit_CN = np.array([alone[a] + alone[b] + first[a] + second[b] + company[a, b] for a, b in prompts])
    gap_CN = np.tanh(logit_CN / 2)
    return dict(zip(prompts, np.where(gap_CN > 0, 200, 180) * gap_CN, strict=True))


def searched(table, seed, most, **more):
    return search_words(
        np.eye(WORDS),
        lambda ids: np.stack([table[each] for each in ids]),
        settings=RlSettings(length=LENGTH, **more),
        most=most,
        seed=seed,
    )


def test_a_quarter_of_the_calls_finds_the_best_twentieth():
    hits = random_hits = 0
    for seed in range(20):
        table = landscape(seed)
        top = sorted(table, key=lambda ids: -table[ids].mean())[: len(table) // 20]
        known, _ = searched(table, seed, len(table) // 4)
        assert len(known) == len(table) // 4
        hits += bool(set(top) & set(known))
        drawn = np.random.default_rng(seed).permutation(len(table))[: len(known)]
        random_hits += bool(set(top) & {list(table)[at] for at in drawn})
    assert hits == 20, (hits, random_hits)
