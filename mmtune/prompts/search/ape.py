"""APE: prompts induced from examples, filtered on few rows, and resampled around the best.

Zhou et al. 2022, "Large Language Models Are Human-Level Prompt Engineers" (arXiv:2211.01910), with its iterative
Monte Carlo search: a round scores its prompts on a random subset of rows and the best few, a quarter of the population,
on all of them; the next round is made of variants of the best so far. The first round looks at three times as many, for
what it does not meet no variant will.
"""

from __future__ import annotations

from mmtune.prompts.search.candidate import Candidate
from mmtune.prompts.search.problem import Method, Problem, Sizes
from mmtune.prompts.search.scorer import Scorer
from mmtune.prompts.search.space import Admission

_FIRST = 3
"""So many populations are induced to begin with."""
_DRY_ROUNDS = 20
"""So many rounds without a new prompt end the search: the space is used up."""


def ape(problem: Problem, scorer: Scorer, admission: Admission) -> None:
    """Searches until the budget, or the space, is used up."""
    dice = problem.dice("ape")
    kept = max(1, problem.population // 4)
    alive = _filled(problem, admission, problem.proposer.first(_FIRST * problem.population, dice))
    dry = 0
    while dry < _DRY_ROUNDS:
        dry = 0 if alive else dry + 1
        batch = sorted(dice.sample(range(problem.rows), min(problem.minibatch, problem.rows)))
        looks = [(float(scorer(one, batch).mean()), -at, one) for at, one in enumerate(alive)]
        for *_, one in sorted(looks, key=lambda look: look[:2], reverse=True)[:kept]:
            scorer(one)
        parents = sorted(scorer.full, key=lambda one: -one.score)[:kept]
        each = -(-problem.population // len(parents))
        children = [child for one in parents for child in problem.proposer.near(one.candidate, each, dice)]
        alive = admission(children[: problem.population])


def _filled(problem: Problem, admission: Admission, proposed: list[Candidate]) -> list[Candidate]:
    """Returns the admitted prompts, filled up with variants of the start where they are few."""
    alive = admission(proposed)
    dice = problem.dice("ape fill")
    for _ in range(_DRY_ROUNDS):
        missing = _FIRST * problem.population - len(alive)
        if missing <= 0:
            break
        alive += admission(problem.proposer.near(problem.space.start, missing, dice))
    return alive


def _least(sizes: Sizes) -> int:
    return _FIRST * sizes.population * min(sizes.minibatch, sizes.rows) + sizes.rows


METHOD = Method(ape, _least)
