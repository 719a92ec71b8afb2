"""The largest micro batch, run once before step 1: what does not fit fails at once, and time can be foretold."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmtune.training.guards import memory_errors

if TYPE_CHECKING:
    from mmtune.training.batching import Batching
    from mmtune.training.engine import Plain
    from mmtune.training.zero import Zero


@dataclass(frozen=True)
class Rehearsal:
    """What the largest micro batch took.

    Attributes:
        rows: Its rows.
        tokens: Its tokens, padding included.
        seconds: For the forward and the backward pass.
        peak_bytes: Most memory so far: of the accelerator, or of the process on a CPU.
        mean_share: Cost of a mean micro batch over its cost.
    """

    rows: int
    tokens: int
    seconds: float
    peak_bytes: int
    mean_share: float


def rehearse(model: Any, engine: Plain | Zero, batching: Batching, accelerator: Any) -> Rehearsal:
    """Runs forward and backward over the largest micro batch of the first epoch; leaves the model as it was.

    Raises:
        ResourceError: Memory ran out, with the ids of its examples.
    """
    batches = batching.plan.epoch_batches(0)
    costs = np.asarray([batching.plan.cost(own) for own in batches], dtype=np.float64)
    units = batches[int(costs.argmax())]
    device = accelerator.device
    batch = {name: value.to(device) for name, value in batching.batches.batch(units, 0).items()}

    def forward() -> tuple[torch.Tensor, int]:
        with accelerator.autocast():
            return batching.loss(model, batch)

    training = model.training
    model.train()
    began = time.perf_counter()
    try:
        with memory_errors(units, batching.batches.ids):
            loss, count = engine.run(forward)
            if loss.requires_grad:
                engine.backward(loss / max(count, 1), last=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    finally:
        engine.forget()
        model.train(training)
    seconds = time.perf_counter() - began
    rows = int(batching.plan.sizes.rows[units].sum())
    return Rehearsal(rows, batch["input_ids"].numel(), seconds, _peak_bytes(device), float(costs.mean() / costs.max()))


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
