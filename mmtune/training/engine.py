"""Who takes a step: PyTorch itself (one process, several, FSDP2) or DeepSpeed; the loop asks both for the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mmtune.models.spread import is_sharded
from mmtune.training.optimizer import Optimizer
from mmtune.training.ranks import sum_gradients
from mmtune.training.sharding import gradient_norm
from mmtune.training.zero import Zero


class Plain:
    """Steps by PyTorch's own means.

    Attributes:
        together: Every process passes as often as the others, also one with nothing to add.
    """

    def __init__(self, model: Any, optimizer: Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        # Named once: a walk over every module at each step is a share of a short one.
        self._parameters = list(model.parameters())
        self.together = is_sharded(model)

    def run(self, compute: Callable[[], Any]) -> Any:
        """Returns what ``compute``, a forward pass, returns."""
        return compute()

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds a share of the step's loss to the gradients; ``last`` of this process's in the step."""
        loss.backward()

    def exchange(self) -> None:
        """Sums the gradients over the processes."""
        sum_gradients(self._parameters)

    def norm(self, clip: float | None) -> float:
        """Returns the norm of the gradient over all processes, and sees to it that the step is clipped."""
        return gradient_norm(self._parameters, clip)

    def step(self) -> None:
        """Moves the weights and forgets the gradients."""
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def forget(self) -> None:
        """Forgets the gradients."""
        self._model.zero_grad(set_to_none=True)


def engine_of(model: Any, optimizer: Optimizer | Zero) -> Plain | Zero:
    """Returns what takes the steps of an optimizer."""
    return optimizer if isinstance(optimizer, Zero) else Plain(model, optimizer)


def precision_of(asked: str) -> str:
    """Returns ``fp32`` or ``bf16``; ``auto`` is bf16 on a GPU that has it."""
    if asked != "auto":
        return asked
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
