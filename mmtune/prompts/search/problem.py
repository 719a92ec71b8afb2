"""A search as its method gets it, and what it leaves."""

from __future__ import annotations

import contextlib
import importlib.util
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmtune.errors import CapabilityError, RecipeError
from mmtune.prompts.search.budget import Exhausted
from mmtune.prompts.search.proposer import Proposer, Solved
from mmtune.prompts.search.scorer import Scored, Scorer
from mmtune.prompts.search.space import Admission, Space


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the fewest calls of a method depend on.

    Attributes:
        rows: Number of dev rows.
        population: Prompts that are alive at once.
        minibatch: Rows of a first look.
    """

    rows: int
    population: int = 8
    minibatch: int = 16


@dataclass(frozen=True)
class Problem(Sizes):
    """What is searched, and how.

    Attributes:
        space: The prompts that may be tried.
        proposer: Proposes them.
        seed: Of the search.
        feedback: More rows as a proposer reads them, numbered behind the dev rows: their mistakes say what to change,
            no prompt is chosen by them.
        settings: Of one method alone, such as the learning rate of ``rl``.
    """

    space: Space
    proposer: Proposer
    seed: int = 0
    feedback: tuple[Solved, ...] = ()
    settings: Any = None

    def dice(self, name: str) -> random.Random:
        """Returns dice of this search's seed for one purpose."""
        return random.Random(f"{self.seed}\0{name}")


@dataclass(frozen=True, slots=True)
class Method:
    """A way to search.

    Attributes:
        search: Runs until it is done or the budget is (``Exhausted`` may pass through it).
        least: Fewest model calls beside the start's that it can do anything with.
        needs: Module of a library that it cannot do without, or empty.
        extra: What installs that library.
        random: Random search among the prompts of this method, where they are none that the proposer draws.
    """

    search: Callable[[Problem, Scorer, Admission], None]
    least: Callable[[Sizes], int]
    needs: str = ""
    extra: str = "prompt"
    random: Callable[[Problem, Scorer, Admission], None] | None = None

    def check(self, sizes: Sizes, budget: int, name: str) -> None:
        """Raises what keeps a search from beginning.

        Args:
            sizes: Of the search.
            budget: Model calls.
            name: Of the method, for the message.

        Raises:
            RecipeError: The budget is too small.
            CapabilityError: The library is not installed.
        """
        least = sizes.rows + self.least(sizes)
        if budget < least:
            raise RecipeError(
                f"prompt.budget is {budget:,} model calls, {name} needs at least {least:,} "
                f"({sizes.rows} dev rows, population {sizes.population}, minibatch {sizes.minibatch})",
                "raise prompt.budget, or lower dev, population or minibatch",
                "small_budget",
            )
        if self.needs and importlib.util.find_spec(self.needs) is None:
            raise CapabilityError(
                f"prompt.method {name} needs {self.needs}", f"pip install 'mmtune[{self.extra}]'", "missing_library"
            )


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    Attributes:
        best: The best prompt on all dev rows; never worse there than the start.
        start: The start on all dev rows.
        calls: Model calls spent.
        tried: Prompts that were scored, on some rows or all.
        refused: Proposals that were refused, by reason.
    """

    best: Scored
    start: Scored
    calls: int
    tried: int
    refused: dict[str, int]


def search(problem: Problem, scorer: Scorer, method: Method, name: str) -> Found:
    """Returns what a method finds within the budget; the start is scored first, on all rows.

    Args:
        problem: What is searched.
        scorer: Asks the model; its budget is the search's.
        method: How.
        name: Of the method, for the message.

    Raises:
        RecipeError: The budget is too small for the method to begin.
        CapabilityError: Its library is not installed.
    """
    method.check(problem, scorer.budget.total, name)
    admission = Admission(problem.space)
    admission([problem.space.start])
    scorer(problem.space.start)
    start = scorer.best
    assert start is not None
    with contextlib.suppress(Exhausted):
        method.search(problem, scorer, admission)
    assert scorer.best is not None
    return Found(scorer.best, start, scorer.budget.spent, scorer.tried, dict(admission.refused))
