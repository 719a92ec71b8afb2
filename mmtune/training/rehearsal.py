"""The largest micro batches, run before step 1: what does not fit fails at once, and time can be foretold."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmtune.models.fused_parts import fused_parts
from mmtune.training.guards import memory_errors

if TYPE_CHECKING:
    from mmtune.training.batching import Batching
    from mmtune.training.engine import Plain
    from mmtune.training.zero import Zero


@dataclass(frozen=True)
class Rehearsal:
    """What the micro batch with the most tokens took.

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


def rehearse(
    model: Any, engine: Plain | Zero, batching: Batching, accelerator: Any, section: str = "finetune"
) -> Rehearsal:
    """Runs forward and backward over the first epoch's micro batches of the most media, label and other tokens.

    They run as at the last step, when every tower trains that ever does. The model is left as it was; ``section`` of
    the recipe is named in the advice where memory runs out.

    Raises:
        ResourceError: Memory ran out, with the ids of the examples.
    """
    plan, device = batching.plan, accelerator.device
    batches = plan.run_batches(0)
    costs = np.asarray([plan.cost(own) for own in batches], dtype=np.float64)
    training = model.training
    model.train()
    try:
        media = np.asarray([plan.media(own) for own in batches])
        targets = np.asarray([plan.targets([own]) for own in batches])
        with fused_parts(model):
            for number in heaviest(costs, media, targets, again=device.type != "cpu"):
                units = batches[number]
                tokens, seconds = _run(model, engine, batching, units, accelerator, section)
    finally:
        engine.forget()
        model.train(training)
    rows = int(plan.sizes.rows[units].sum())
    return Rehearsal(rows, tokens, seconds, _peak_bytes(device), float(costs.mean() / costs.max()))


def heaviest(tokens: np.ndarray, media: np.ndarray, targets: np.ndarray, *, again: bool) -> list[int]:
    """Returns the numbers of the micro batches to rehearse; the one with the most tokens comes last.

    Args:
        tokens: ``(n,)`` of the micro batches.
        media: ``(n,)`` media tokens of them.
        targets: ``(n,)`` label tokens of them, which have logits.
        again: Run the last one twice, as kernels are compiled the first time.
    """
    most = int(tokens.argmax())
    others = [int(size.argmax()) for size in (media, targets) if size.max() > size[most]]
    return [*dict.fromkeys(others), most, *([most] if again else [])]


def _run(
    model: Any, engine: Plain | Zero, batching: Batching, units: np.ndarray, accelerator: Any, section: str
) -> tuple[int, float]:
    """Runs one micro batch; returns its tokens, padding included, and the seconds."""
    device = accelerator.device
    made = batching.batches.batch(units, batching.plan.total_steps - 1)
    batch = {name: value.to(device) for name, value in made.items()}

    def forward() -> tuple[torch.Tensor, int]:
        with accelerator.autocast():
            return batching.loss(model, batch)

    began = time.perf_counter()
    with memory_errors(units, batching.batches.ids, section):
        loss, count = engine.run(forward)
        if loss.requires_grad:
            engine.backward(loss / max(count, 1), last=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    engine.forget()
    return batch["input_ids"].numel(), time.perf_counter() - began


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
