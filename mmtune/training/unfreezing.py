"""Towers that stay frozen for the first epochs of a run, as the encoders of MMBT do (Kiela et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmtune.models.towers import tower_of
from mmtune.training.batching import Batching, WithColumns, step_column

if TYPE_CHECKING:
    from mmtune.training.plan import Plan


class Unfreezing:
    """The parameters of a model that start frozen."""

    def __init__(self, model: nn.Module, steps: Mapping[str, int], tower: Callable[[str], str] = tower_of) -> None:
        """Notes what would train.

        Args:
            model: All that ever trains requires gradients.
            steps: For how many steps a tower stays frozen.
            tower: The tower of a parameter by its name.
        """
        self._waits = [
            (parameter, steps[tower(name)])
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and tower(name) in steps
        ]

    def at(self, step: int) -> None:
        """Freezes and thaws as it is at a step, counted from 0."""
        for parameter, steps in self._waits:
            parameter.requires_grad_(step >= steps)

    def thaw(self) -> None:
        """Lets all train, for saving and loading them."""
        self.at(max((steps for _, steps in self._waits), default=0))


def frozen_steps(epochs: Mapping[str, float], plan: Plan) -> dict[str, int]:
    """Returns how many steps of a plan some numbers of epochs are, by the same names."""
    per_epoch = -(-len(plan.epoch_batches(0)) // plan.micro_batches)
    return {name: round(own * per_epoch) for name, own in epochs.items()}


def said_of_stages(steps: Mapping[str, int], total: int) -> Iterator[str]:
    """Yields a sentence per tower: when it trains in a run of so many steps."""
    for tower, own in sorted(steps.items()):
        when = f"trains from step {own + 1} on" if own < total else "never trains: the run is shorter"
        yield f"the {tower} tower {when}"


def in_stages(made: Batching, unfreezing: Unfreezing) -> Batching:
    """Returns the batching of training rows whose loss freezes and thaws towers by the step."""

    def loss(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        unfreezing.at(int(batch["step"]))
        return made.loss(model, {name: value for name, value in batch.items() if name != "step"})

    return replace(made, batches=WithColumns(made.batches, step_column), loss=loss)
