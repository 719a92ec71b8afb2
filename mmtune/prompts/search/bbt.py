"""Black-box tuning of soft tokens: CMA-ES in a random subspace (Sun et al. 2022, arXiv:2201.03514).

A soft prompt of V tokens of width H is ``A z + p0``: z has d values and is searched without gradients, A is drawn once
and never changes, p0 is where the search starts. The spread of A follows BBTv2 (arXiv:2205.11200, section 3.3): a
prompt of the first generation is about as far from p0 as word embeddings are from their mean.

CMA-ES draws from dice of its own seed and of nothing else, so the same losses lead to the same prompts: a search that
was stopped is replayed by answering again what was answered before.

Shapes: C prompts of a generation, V soft tokens, H width of the embeddings, d width of the subspace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmtune.errors import CapabilityError, RecipeError
from mmtune.prompts.search.reward import check_finite


@dataclass(frozen=True, slots=True)
class BbtSettings:
    """How the subspace is searched; the defaults are the paper's, but for the budget.

    Attributes:
        soft_tokens: V; the paper takes 50.
        dimension: d; the paper takes 500.
        population: Prompts of a generation.
        sigma: First standard deviation of z.
        alpha: Stretches A.
    """

    soft_tokens: int = 50
    dimension: int = 500
    population: int = 20
    sigma: float = 1.0
    alpha: float = 1.0


@dataclass(frozen=True)
class Subspace:
    """A random subspace of soft prompts.

    Attributes:
        matrix_Nd: A, with N = V * H rows.
        start_VH: p0.
    """

    matrix_Nd: np.ndarray
    start_VH: np.ndarray

    def prompt(self, z_d: np.ndarray) -> np.ndarray:
        """Returns ``(V, H)`` the soft prompt ``A z + p0``."""
        return (self.matrix_Nd @ z_d).reshape(self.start_VH.shape) + self.start_VH


def random_subspace(start_VH: np.ndarray, spread: float, settings: BbtSettings, seed: int) -> Subspace:
    """Returns the subspace around a soft prompt; A is drawn from ``N(0, (alpha * spread / (sqrt(d) * sigma))^2)``.

    Args:
        start_VH: p0.
        spread: Standard deviation of the model's word embeddings.
        settings: Width, alpha and sigma.
        seed: Of the draw.
    """
    deviation = settings.alpha * spread / (math.sqrt(settings.dimension) * settings.sigma)
    rng = np.random.default_rng([seed, 0])
    return Subspace(rng.normal(scale=deviation, size=(start_VH.size, settings.dimension)), start_VH)


def check_budget(prompts: int, settings: BbtSettings) -> None:
    """Raises RecipeError unless the budget pays for one whole generation.

    Args:
        prompts: Soft prompts that may be scored.
        settings: With the population.
    """
    if prompts < settings.population:
        raise RecipeError(
            f"the budget pays for {prompts:,} soft prompts, fewer than one generation of {settings.population}",
            "raise prompt.budget, or lower prompt.bbt.population or prompt.dev",
            "budget_too_small",
        )


def strategy(settings: BbtSettings, seed: int) -> Any:
    """Returns CMA-ES at z = 0, with dice of its own.

    Raises:
        CapabilityError: ``cma`` is not installed.
    """
    try:
        import cma
    except ImportError as error:
        raise CapabilityError(
            "prompt.method bbt needs cma", 'pip install "mmtune[prompt]"', "missing_extra"
        ) from error
    rng = np.random.default_rng([seed, 1])
    options = {
        "popsize": settings.population,
        "randn": lambda *shape: rng.standard_normal(shape),
        # Not a number: leave NumPy's global dice alone.
        "seed": float("nan"),
        "verbose": -9,
    }
    return cma.CMAEvolutionStrategy(np.zeros(settings.dimension), settings.sigma, options)


def generations(
    loss: Callable[[Sequence[np.ndarray]], np.ndarray], *, settings: BbtSettings, most: int, seed: int
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Yields the z of every generation with their losses, until the budget or CMA-ES itself ends it.

    Args:
        loss: The z of a generation to ``(C,)`` losses.
        settings: How the subspace is searched.
        most: Soft prompts that may be scored; the last generation is whole.
        seed: Of the search.

    Raises:
        RecipeError: The budget is smaller than a generation.
        DivergedError: A loss is no number.
        CapabilityError: ``cma`` is not installed.
    """
    check_budget(most, settings)
    search = strategy(settings, seed)
    for number in range(most // settings.population):
        if search.stop():
            return
        asked = search.ask()
        loss_C = np.asarray(loss(asked), dtype=np.float64)
        check_finite(loss_C, [f"soft prompt {at} of generation {number}" for at in range(len(asked))])
        search.tell(asked, loss_C)
        yield asked, loss_C
