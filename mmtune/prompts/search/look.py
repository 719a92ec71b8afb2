"""A first look at several prompts on the same few rows; the one that promises most is scored on all rows.

Random search takes it too: what another method is better by is then what it learned, not how it spent its calls.

Shapes: C prompts, N rows of the look.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np

from mmtune.prompts.search.candidate import Scorable
from mmtune.prompts.search.problem import Problem, Sizes
from mmtune.prompts.search.scorer import Scorer


def look_rows(problem: Problem, dice: random.Random) -> list[int]:
    """Returns the numbers of the rows of the next look, ascending."""
    return sorted(dice.sample(range(problem.rows), min(problem.minibatch, problem.rows)))


def look_calls(sizes: Sizes, prompts: int) -> int:
    """Returns the most calls that a look at so many prompts takes, the whole score of the best included."""
    return prompts * min(sizes.minibatch, sizes.rows) + sizes.rows


def look(scorer: Scorer, prompts: Sequence[Scorable], rows: Sequence[int]) -> np.ndarray:
    """Returns ``(C, N)`` rewards; the best prompt is scored on all rows where it beats the best so far on these.

    Raises:
        Exhausted: The budget does not reach.
    """
    reward_CN = np.stack([scorer(prompt, rows) for prompt in prompts])
    mean_C = reward_CN.mean(1)
    first = int(mean_C.argmax())
    if scorer.best is None or mean_C[first] > scorer(scorer.best.candidate, rows).mean():
        scorer(prompts[first])
    return reward_CN


def look_blindly(problem: Problem, scorer: Scorer, draw: Callable[[int], Sequence[Scorable]]) -> None:
    """Looks at drawn prompts, a population at a time, until the budget does not reach or nothing new is drawn.

    Args:
        problem: What is searched.
        scorer: Asks the model.
        draw: Number to at most as many prompts that were not looked at before; learns nothing from their rewards.

    Raises:
        Exhausted: The budget does not reach.
    """
    dice, batch_rows = problem.dice("blind"), min(problem.minibatch, problem.rows)
    while scorer.budget.left >= look_calls(problem, 1):
        prompts = draw(min(problem.population, (scorer.budget.left - problem.rows) // batch_rows))
        if not prompts:
            return
        look(scorer, prompts, look_rows(problem, dice))
