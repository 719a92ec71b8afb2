"""What a frozen model's option probabilities are worth as a reward, and how rewards of one input are compared.

The piecewise reward and the z-score are those of RLPrompt (Deng et al. 2022, arXiv:2205.12548, section 3.2).
Shapes: N rows, L options, C prompts of a group, T prompts so far.
"""

from __future__ import annotations

import numpy as np

WRONG, RIGHT = 180.0, 200.0
"""lambda_1 and lambda_2 of the paper's classification experiments."""
_EQUAL = 1e-9
"""Rewards that differ by less than this share of their size are equal: a difference of rounding is no signal."""


def gap_reward(score_L: np.ndarray, answer: int, *, wrong: float = WRONG, right: float = RIGHT) -> float:
    """Returns the piecewise reward of one row: the gap times ``right`` where the answer wins, else times ``wrong``.

    The gap is the probability of the answer less that of the likeliest other option, the options' probabilities
    summing to one.

    Args:
        score_L: Log-probability of every option, up to a constant; two at least.
        answer: Number of the right option.
        wrong: lambda_1.
        right: lambda_2.
    """
    probability_L = np.exp(score_L - np.logaddexp.reduce(score_L))
    gap = float(probability_L[answer] - np.delete(probability_L, answer).max())
    return gap * (right if gap > 0 else wrong)


def z_scores(reward_CN: np.ndarray, among_TN: np.ndarray) -> np.ndarray:
    """Returns ``(C, N)`` rewards of every input standardised among its prompts; 0 where all prompts earn the same.

    Args:
        reward_CN: Reward of every prompt of a group on every input.
        among_TN: Rewards of all prompts to compare with, these among them; NaN where one was not scored.
    """
    middle_N, spread_N = np.nanmean(among_TN, 0), np.nanstd(among_TN, 0)
    equal_N = spread_N <= _EQUAL * np.maximum(np.abs(middle_N), 1.0)
    return np.where(equal_N, 0.0, (reward_CN - middle_N) / np.where(equal_N, 1.0, spread_N))
