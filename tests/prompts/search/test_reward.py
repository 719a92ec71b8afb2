"""Rewards against the paper's formulas, written down once more with plain loops."""

import math

import numpy as np
import pytest

from mmtune.prompts.search.reward import piecewise, z_scores
from mmtune.stages.prompt.asking import gap


def paper_reward(logits, label, wrong, right):
    """RLPrompt, equation 5: R = lambda_1^(1 - Correct) * lambda_2^Correct * Gap."""
    total = sum(math.exp(value) for value in logits)
    probabilities = [math.exp(value) / total for value in logits]
    gap = probabilities[label] - max(p for at, p in enumerate(probabilities) if at != label)
    correct = 1 if gap > 0 else 0
    return wrong ** (1 - correct) * right**correct * gap


def test_the_reward_is_the_papers():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        logits = rng.normal(size=rng.integers(2, 6)) * 3
        label = int(rng.integers(len(logits)))
        right = [at == label for at in range(len(logits))]
        ours = float(piecewise(np.array([gap(logits - 40.0, right)]), wrong=180.0, right=200.0)[0])
        assert ours == pytest.approx(paper_reward(list(logits), label, 180.0, 200.0), rel=1e-9, abs=1e-9)
        seen.add(ours > 0)
    assert seen == {True, False}


def test_a_tie_is_not_right():
    assert piecewise(np.array([0.0])) == 0.0


def test_z_scores_are_those_of_every_input_over_its_prompts():
    reward_CN = np.random.default_rng(1).normal(size=(5, 3)) * 100
    among_TN = np.concatenate([reward_CN, [[7.0, np.nan, np.nan]]])
    for at in range(3):
        column = [value for value in among_TN[:, at] if not math.isnan(value)]
        middle = sum(column) / len(column)
        spread = math.sqrt(sum((value - middle) ** 2 for value in column) / len(column))
        wanted = [(value - middle) / spread for value in reward_CN[:, at]]
        assert z_scores(reward_CN, among_TN)[:, at] == pytest.approx(wanted)


def test_equal_rewards_are_no_signal():
    reward_CN = np.full((4, 2), 0.1 + 0.2)
    reward_CN[:2] = 0.3
    assert not z_scores(reward_CN, reward_CN).any()
    assert not z_scores(np.ones((1, 3)), np.ones((1, 3))).any()
