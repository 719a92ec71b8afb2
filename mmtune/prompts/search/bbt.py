"""Black-box tuning of soft tokens: CMA-ES in a random subspace (Sun et al. 2022, arXiv:2201.03514).

A soft prompt of V tokens of width H is ``A z + p0``: z has d values and is searched without gradients, A is drawn once
and never changes, p0 is where the search starts. The spread of A follows BBTv2 (arXiv:2205.11200, section 3.3): a
prompt of the first generation is about as far from p0 as word embeddings are from their mean.

CMA-ES draws from dice of its own seed and of nothing else, so that equal rewards lead to equal prompts.
Shapes: C prompts of a generation, V soft tokens, H width of the embeddings, d width of the subspace.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmtune.prompts.search.look import look, look_blindly, look_calls, look_rows
from mmtune.prompts.search.problem import Method, Problem
from mmtune.prompts.search.scorer import Scorer
from mmtune.prompts.search.space import Admission


@dataclass(frozen=True, slots=True)
class BbtSettings:
    """The subspace.

    Attributes:
        dimension: d; the paper takes 500.
        sigma: First standard deviation of z.
    """

    dimension: int = 500
    sigma: float = 1.0


@dataclass(frozen=True, slots=True)
class SoftPrompt:
    """A soft prompt by its place in the subspace.

    Attributes:
        z: d values.
    """

    z: tuple[float, ...]

    @property
    def key(self) -> str:
        """Returns a short hash, equal for equal values."""
        return hashlib.blake2b(np.array(self.z).tobytes(), digest_size=8).hexdigest()

    def facts(self) -> dict[str, Any]:
        """Returns the place as JSON."""
        return {"z": list(self.z)}


@dataclass(frozen=True)
class Subspace:
    """A random subspace of soft prompts.

    Attributes:
        matrix_Nd: A, with N = V * H rows.
        start_VH: p0.
    """

    matrix_Nd: np.ndarray
    start_VH: np.ndarray

    def vectors(self, prompt: SoftPrompt) -> np.ndarray:
        """Returns ``(V, H)`` the soft tokens ``A z + p0``."""
        return (self.matrix_Nd @ np.array(prompt.z)).reshape(self.start_VH.shape) + self.start_VH


def random_subspace(
    start_VH: np.ndarray, spread: float, *, settings: BbtSettings, alpha: float = 1.0, seed: int
) -> Subspace:
    """Returns the subspace around p0; A is drawn from ``N(0, (alpha * spread / (sqrt(d) * sigma))^2)``.

    Args:
        start_VH: p0.
        spread: Standard deviation of the model's word embeddings.
        settings: d and sigma.
        alpha: Stretches A.
        seed: Of the draw.
    """
    deviation = alpha * spread / (math.sqrt(settings.dimension) * settings.sigma)
    rng = np.random.default_rng([seed, 0])
    return Subspace(rng.normal(scale=deviation, size=(start_VH.size, settings.dimension)), start_VH)


def evolution(settings: BbtSettings, population: int, seed: int) -> Any:
    """Returns CMA-ES at z = 0, with dice of its own."""
    with warnings.catch_warnings():
        # It misses matplotlib, for plots that nobody asks for.
        warnings.simplefilter("ignore")
        import cma

    rng = np.random.default_rng([seed, 1])
    # With draws of our own cma leaves NumPy's global dice alone.
    options = {"popsize": population, "randn": lambda *shape: rng.standard_normal(shape), "verbose": -9}
    return cma.CMAEvolutionStrategy(np.zeros(settings.dimension), settings.sigma, options)


def bbt_search(problem: Problem, scorer: Scorer, admission: Admission) -> None:
    """Searches until the budget is used up or CMA-ES ends itself; p0 comes first, the last mean is scored as well."""
    settings: BbtSettings = problem.settings
    search, dice = evolution(settings, problem.population, problem.seed), problem.dice("bbt")
    scorer(SoftPrompt((0.0,) * settings.dimension))
    while scorer.budget.left >= look_calls(problem, problem.population) + problem.rows and not search.stop():
        asked = search.ask()
        prompts = [SoftPrompt(tuple(float(value) for value in z_d)) for z_d in asked]
        reward_CN = look(scorer, prompts, look_rows(problem, dice))
        search.tell(asked, -reward_CN.mean(1))
    scorer(SoftPrompt(tuple(float(value) for value in search.mean)))


def random_soft(problem: Problem, scorer: Scorer, admission: Admission) -> None:
    """Scores p0 and looks at draws of the first generation's distribution until the budget is used up."""
    settings: BbtSettings = problem.settings
    rng = np.random.default_rng([problem.seed, 2])

    def draw(count: int) -> list[SoftPrompt]:
        drawn_Cd = rng.normal(scale=settings.sigma, size=(count, settings.dimension))
        return [SoftPrompt(tuple(float(value) for value in z_d)) for z_d in drawn_Cd]

    scorer(SoftPrompt((0.0,) * settings.dimension))
    look_blindly(problem, scorer, draw)


METHOD = Method(
    bbt_search,
    lambda problem: look_calls(problem, problem.population) + 2 * problem.rows,
    needs="cma",
    random=random_soft,
)
