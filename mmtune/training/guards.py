"""Guards against a step that would ruin the weights: non-finite numbers, and a jump of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from mmtune.errors import DivergedError, ResourceError

_NAMED = 8
# What a CPU allocation and the kernels of an accelerator say when memory runs out.
_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
_LESS = {
    "finetune": "lower finetune.batch_tokens, batch_rows or batch_media_tokens and raise accumulate as much,"
    " or set finetune.checkpointing",
    "pretrain": "lower pretrain.batch_tokens or batch_rows and raise accumulate as much",
}


def refuse_non_finite(
    losses: Sequence[float],
    norm: float,
    chosen: Sequence[np.ndarray],
    *,
    step: int,
    ids: Callable[[np.ndarray], list[str]],
    last_good: str,
    section: str = "finetune",
) -> None:
    """Raises when the loss or the gradient of a step is not finite; call it before the optimizer.

    Args:
        losses: Summed loss of every micro batch of the step, over all processes.
        norm: Norm of the gradient.
        chosen: Tree indices of every micro batch.
        step: Steps done.
        ids: Tree indices to the example ids in them.
        last_good: Where the last checkpoint is, in words.
        section: Of the recipe, for the advice.

    Raises:
        DivergedError: With the ids of the examples in the micro batches that were not finite.
    """
    bad = [trees for trees, loss in zip(chosen, losses, strict=True) if not math.isfinite(loss)]
    if not bad and math.isfinite(norm):
        return
    names = [example for trees in bad or chosen for example in ids(trees)]
    raise DivergedError(
        f"the {'loss' if bad else 'gradient'} of step {step + 1} is not finite, its update was not made;"
        f" examples: {_some(names)}; last good checkpoint: {last_good}",
        f"lower {section}.learning_rate or look at these examples, then run the same command again",
        "non_finite",
    )


@contextmanager
def memory_errors(
    trees: np.ndarray, ids: Callable[[np.ndarray], list[str]], section: str = "finetune"
) -> Iterator[None]:
    """Names the examples of a micro batch that does not fit into memory, and what to lower in the recipe's section.

    Raises:
        ResourceError: Memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = str(error)
        if not isinstance(error, MemoryError) and not any(part in said.lower() for part in _NO_MEMORY):
            raise
        raise ResourceError(
            f"memory ran out over a micro batch with the examples {_some(ids(trees))}:"
            f" {said.splitlines()[0] if said else type(error).__name__}",
            _LESS[section],
            "out_of_memory",
        ) from error


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


class Spikes:
    """Notices a loss far above its running mean.

    Args:
        sigmas: How many running standard deviations above the mean are a spike.
        after: Steps before the first verdict.
        decay: Weight of the past in the running mean and variance.
    """

    def __init__(self, sigmas: float = 6.0, after: int = 20, decay: float = 0.95) -> None:
        self._sigmas, self._after, self._decay = sigmas, after, decay
        self._mean = self._variance = 0.0
        self._steps = 0

    def over(self, loss: float) -> float | None:
        """Takes the loss of a step; returns the running mean when it is a spike above it, else None."""
        self._steps += 1
        if self._steps == 1:
            self._mean = loss
            return None
        gap, mean = loss - self._mean, self._mean
        # A loss that hardly varies must still be allowed to wobble by a twentieth.
        allowed = self._sigmas * max(math.sqrt(self._variance), 0.05 * abs(mean), 1e-6)
        spike = self._steps > self._after and gap > allowed
        # One spike hardly moves the mean; a lasting rise becomes the new normal.
        gap = min(gap, allowed) if spike else gap
        self._mean += (1 - self._decay) * gap
        self._variance = self._decay * (self._variance + (1 - self._decay) * gap * gap)
        return mean if spike else None

    def state(self) -> dict[str, float]:
        """Returns the running numbers that a checkpoint keeps: a resumed run notices what the unbroken one does."""
        return {"spike_mean": self._mean, "spike_variance": self._variance, "spike_steps": self._steps}

    def restore(self, state: Mapping[str, float]) -> None:
        """Takes up the numbers of a checkpoint."""
        self._mean, self._variance = float(state["spike_mean"]), float(state["spike_variance"])
        self._steps = int(state["spike_steps"])
