"""Random search: prompts drawn by the proposer, looked at in groups like others; the baseline of every other method."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice

from mmtune.prompts.search.candidate import Candidate
from mmtune.prompts.search.look import look_blindly, look_calls
from mmtune.prompts.search.problem import Method, Problem
from mmtune.prompts.search.scorer import Scorer
from mmtune.prompts.search.space import Admission

_DRAWS = 32
_DRY = 20
"""So many rounds without a new prompt end the search: the space is used up."""


def draws(problem: Problem, dice: random.Random) -> Iterator[Candidate]:
    """Yields prompts without end: those of the proposer, then random walks of one to three steps from them."""
    known = [problem.space.start, *problem.proposer.first(_DRAWS, dice)]
    for one in known:
        yield problem.space.draw(one.instruction, dice)
    while True:
        candidate = dice.choice(known)
        for _ in range(dice.randint(1, 3)):
            candidate = next(iter(problem.proposer.near(candidate, 1, dice)), candidate)
        yield problem.space.draw(candidate.instruction, dice)


def random_search(problem: Problem, scorer: Scorer, admission: Admission) -> None:
    """Looks at drawn prompts until the budget, or the space, is used up."""
    new = _new(draws(problem, problem.dice("random")), admission)
    look_blindly(problem, scorer, lambda count: list(islice(new, count)))


def _new(drawn: Iterator[Candidate], admission: Admission) -> Iterator[Candidate]:
    """Yields the prompts that are not refused, until many in a row are."""
    dry = 0
    for candidate in drawn:
        fresh = admission([candidate])
        dry = 0 if fresh else dry + 1
        if dry > _DRY * _DRAWS:
            return
        yield from fresh


METHOD = Method(random_search, lambda problem: look_calls(problem, 1))
