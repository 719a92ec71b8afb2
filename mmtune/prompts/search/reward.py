"""What a frozen model's option probabilities are worth as a reward, and how rewards of one input are compared.

The piecewise reward and the z-score are those of RLPrompt (Deng et al. 2022, arXiv:2205.12548, section 3.2).
Shapes: N rows, C prompts of a group, T prompts so far.
"""

from __future__ import annotations

import numpy as np

WRONG, RIGHT = 180.0, 200.0
"""lambda_1 and lambda_2 of the paper's classification experiments."""
_EQUAL = 1e-9
"""Rewards that differ by less than this share of their size are equal: a difference of rounding is no signal."""


def piecewise(gap_N: np.ndarray, *, wrong: float = WRONG, right: float = RIGHT) -> np.ndarray:
    """Returns ``(N,)`` the gap times ``right`` where the right option wins, else times ``wrong``.

    Args:
        gap_N: Probability of the right option less that of the likeliest other one, the options' summing to one.
        wrong: lambda_1.
        right: lambda_2.
    """
    return gap_N * np.where(gap_N > 0, right, wrong)


def z_scores(reward_CN: np.ndarray, among_TN: np.ndarray) -> np.ndarray:
    """Returns ``(C, N)`` rewards of every input standardised among its prompts; 0 where all prompts earn the same.

    Args:
        reward_CN: Reward of every prompt of a group on every input.
        among_TN: Rewards of all prompts to compare with, these among them; NaN where one was not scored.
    """
    middle_N, spread_N = np.nanmean(among_TN, 0), np.nanstd(among_TN, 0)
    equal_N = spread_N <= _EQUAL * np.maximum(np.abs(middle_N), 1.0)
    return np.where(equal_N, 0.0, (reward_CN - middle_N) / np.where(equal_N, 1.0, spread_N))
