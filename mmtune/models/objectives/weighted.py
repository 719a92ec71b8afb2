"""The objective of a run: named losses times their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from mmtune.errors import RecipeError


def check_weights(weights: Mapping[str, float]) -> None:
    """Refuses weights under which nothing would train.

    Raises:
        RecipeError: A weight is negative or not a number, or all are 0.
    """
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise RecipeError(f"the weight of the loss {name} is {weight}", "give a number from 0 up")
    if not any(weights.values()):
        named = ", ".join(weights) or "no loss named"
        raise RecipeError(f"the weights of the losses sum to 0 ({named})", "give one of them a weight above 0")


def weighted_sum(losses: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
    """Returns ``sum_i w_i L_i``; a loss of weight 0 is left out, so the run is bit for bit that without it.

    Args:
        losses: Scalars by name; one of weight 0 need not be there.
        weights: A weight for every loss.

    Raises:
        RecipeError: A loss has no weight, or the weights do not do.
        KeyError: A loss with a weight above 0 was not computed.
    """
    check_weights(weights)
    for name in losses:
        if name not in weights:
            raise RecipeError(f"the loss {name} has no weight", f"name it beside {', '.join(weights)}")
    terms = [losses[name] * weight for name, weight in weights.items() if weight]
    return torch.stack(terms).sum()
