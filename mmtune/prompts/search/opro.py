"""OPRO: the proposer sees the best prompts so far with their scores, worst first, and writes better ones.

Yang et al. 2023, "Large Language Models as Optimizers" (arXiv:2309.03409): every step proposes a few prompts from a
history of at most twenty, and each is scored on all dev rows.
"""

from __future__ import annotations

from mmtune.prompts.search.problem import Method, Problem
from mmtune.prompts.search.scorer import Scorer
from mmtune.prompts.search.space import Admission

_HISTORY = 20
_DRY_STEPS = 20
"""So many steps without a new prompt end the search: the space is used up."""


def opro(problem: Problem, scorer: Scorer, admission: Admission) -> None:
    """Searches until the budget, or the space, is used up."""
    dice = problem.dice("opro")
    for one in admission(problem.proposer.first(problem.population, dice)):
        scorer(one)
    dry = 0
    while dry < _DRY_STEPS:
        history = sorted(scorer.full, key=lambda one: one.score)[-_HISTORY:]
        fresh = admission(problem.proposer.after(history, problem.population, dice))
        dry = 0 if fresh else dry + 1
        for one in fresh:
            scorer(one)


METHOD = Method(opro, lambda problem: problem.population * problem.rows)
