"""The loss on held-out rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mmtune.models.spread import is_sharded, without_gradients
from mmtune.training.feed import Batch
from mmtune.training.loss import answer_loss
from mmtune.training.plan import Plan
from mmtune.training.ranks import sum_tensor
from mmtune.training.signals import Stopped


def validation_loss(
    model: Any,
    accelerator: Any,
    plan: Plan,
    make: Callable[[np.ndarray], Batch],
    loss: Callable[[Any, Batch], tuple[torch.Tensor, int]] = answer_loss,
    stopping: Callable[[], bool] = lambda: False,
    counted: Callable[[], None] = lambda: None,
) -> float:
    """Returns the mean loss per label token over the first epoch of a plan, shared among the processes.

    Args:
        model: In evaluation mode.
        accelerator: For device, precision and rank.
        plan: The batches of the validation split.
        make: Tree indices to a padded batch.
        loss: As in ``loop.Hooks``.
        stopping: Asked before every batch, on all processes alike.
        counted: As in ``loop.Hooks``.

    Raises:
        Stopped: ``stopping`` said so.
    """
    total = torch.zeros(2, dtype=torch.float64)
    world, rank = accelerator.num_processes, accelerator.process_index
    # Processes that gather weights from each other run the same number of batches.
    together = is_sharded(model)
    with without_gradients(model), accelerator.autocast():
        batches = plan.epoch_batches(0)
        for position, counts in plan.shares(batches, rank, world):
            if stopping():
                raise Stopped
            if counts or together:
                batch = {name: value.to(accelerator.device) for name, value in make(batches[position]).items()}
                nll, count = loss(model, batch)
                total += torch.tensor([float(nll), count], dtype=torch.float64) * float(counts)
                if counts:
                    counted()
    nll_sum, count_sum = sum_tensor(total.to(accelerator.device), "summing the validation loss").tolist()
    return float(nll_sum / max(count_sum, 1.0))
