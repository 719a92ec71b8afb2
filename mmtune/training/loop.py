"""The training loop: exact, short, on Accelerate.

The loss of a step is the sum over all label tokens of the global batch divided by their
number, whatever the split into micro batches and processes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from mmtune.errors import DivergedError, IntegrityError
from mmtune.models.towers import fingerprints, moved_towers
from mmtune.training.optimizer import learning_rate
from mmtune.training.plan import Plan, split_ranks, step_seed
from mmtune.training.signals import StopFlag, ignore_in_worker

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = Mapping[str, torch.Tensor]
Trees = Sequence[int] | np.ndarray


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """What the loop itself needs to know."""

    seed: int
    peak_rate: float
    schedule: str
    warmup: float
    clip: float | None
    save_every: int
    log_every: int
    eval_every: int | None
    workers: int


@dataclass(frozen=True)
class Hooks:
    """What the loop calls outward.

    Attributes:
        batch: Tree indices to a padded batch with ``labels``.
        ids: Tree indices to the example ids in them.
        save: ``(step, metrics text)`` writes a checkpoint.
        validate: Returns the validation loss, or None when there is no validation split.
        log: Receives each metrics row.
        advance: ``(steps, note)`` moves the progress.
    """

    batch: Callable[[Trees], Batch]
    ids: Callable[[Trees], list[str]]
    save: Callable[[int, str], None]
    validate: Callable[[], float | None]
    log: Callable[[dict[str, Any]], None]
    advance: Callable[[int, str], None]


@dataclass
class Outcome:
    """How the loop ended.

    Attributes:
        step: Steps done.
        stopped_by: Signal number, 0 when it ran to the end.
        metrics: The metrics file's text.
        seconds: Time in ``wait``, ``forward``, ``backward``, ``optimizer``, ``total``.
    """

    step: int
    stopped_by: int = 0
    metrics: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


def answer_loss(model: Any, batch: Batch) -> tuple[torch.Tensor, int]:
    """Returns the summed cross-entropy in fp32 over the label tokens, and their number.

    Args:
        model: Called with everything in ``batch`` but ``labels``.
        batch: ``labels`` is ``(B, T)`` with -100 where there is no loss.
    """
    labels_BT = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits_BTV = model(**inputs, use_cache=False).logits
    shifted_BT = labels_BT[:, 1:]
    bears_BT = shifted_BT != -100
    logits_NV = logits_BTV[:, :-1][bears_BT].float()
    return functional.cross_entropy(logits_NV, shifted_BT[bears_BT], reduction="sum"), int(bears_BT.sum())


class _MicroBatches(torch.utils.data.Dataset):
    """One rank's micro batches from a step on, in order, for loader processes."""

    def __init__(self, batch: Callable[[Trees], Batch], chosen: list[np.ndarray]) -> None:
        self._batch, self._chosen = batch, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Batch:
        return self._batch(self._chosen[index])


def _stream(hooks: Hooks, chosen: Iterator[np.ndarray], workers: int) -> Iterator[Batch]:
    if workers == 0:
        for trees in chosen:
            yield hooks.batch(trees)
        return
    loader = torch.utils.data.DataLoader(
        _MicroBatches(hooks.batch, list(chosen)),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4,
        worker_init_fn=ignore_in_worker,
    )
    yield from loader


class _Clock:
    """Seconds by part of the step."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(("wait", "forward", "backward", "optimizer", "total"), 0.0)
        self._since = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.spent[part] += now - self._since
        self._since = now

    def skip(self) -> None:
        self._since = time.perf_counter()


def train(
    model: Any,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    plan: Plan,
    settings: LoopSettings,
    hooks: Hooks,
    *,
    start: int = 0,
    metrics: str = "",
) -> Outcome:
    """Runs from step ``start`` to the end of the plan, or to a signal.

    Raises:
        DivergedError: Loss or gradient is not finite; the weights are those of the last good step.
        IntegrityError: A frozen parameter moved in the first step.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    mine = (trees for step in plan.steps(start) for trees, _ in split_ranks(step, rank, world))
    batches = _stream(hooks, mine, settings.workers)
    outcome, clock, window = Outcome(start, metrics=metrics), _Clock(), _Window()
    model.train()
    began = time.perf_counter()
    with StopFlag() as stop:
        for step, chosen in enumerate(plan.steps(start), start=start):
            rate = learning_rate(
                step,
                peak=settings.peak_rate,
                total=plan.total_steps,
                warmup=settings.warmup,
                schedule=settings.schedule,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            before = fingerprints(accelerator.unwrap_model(model)) if step == start else None
            torch.manual_seed(step_seed(settings.seed, step, rank))
            clock.skip()
            nll = _accumulate(model, accelerator, plan, chosen, batches, clock, window)
            norm = _guarded_norm(model, accelerator, settings.clip, nll, chosen, hooks, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            clock.lap("optimizer")
            outcome.step = step + 1
            if before is not None:
                _check_moved(before, accelerator.unwrap_model(model))
            window.add(nll, plan.targets(chosen), norm)
            _after_step(outcome, plan, settings, hooks, window, rate, model)
            if _stop_wanted(stop, accelerator) and outcome.step < plan.total_steps:
                hooks.save(outcome.step, outcome.metrics)
                outcome.stopped_by = stop.wanted or 15
                break
            if outcome.step % settings.save_every == 0 and outcome.step < plan.total_steps:
                hooks.save(outcome.step, outcome.metrics)
    outcome.seconds = {**clock.spent, "total": time.perf_counter() - began}
    return outcome


def _accumulate(
    model: Any,
    accelerator: Accelerator,
    plan: Plan,
    chosen: Sequence[np.ndarray],
    batches: Iterator[Batch],
    clock: _Clock,
    window: _Window,
) -> float:
    """Forward and backward over one step's micro batches; returns the global loss sum."""
    world = accelerator.num_processes
    mine = split_ranks(chosen, accelerator.process_index, world)
    targets = max(plan.targets(chosen), 1)
    total = torch.zeros((), device=accelerator.device)
    for index, (trees, counts) in enumerate(mine):
        batch = {name: value.to(accelerator.device) for name, value in next(batches).items()}
        window.rows += int(plan.sizes.rows[trees].sum()) * counts
        window.tokens += int(batch["attention_mask"].sum()) * counts
        clock.lap("wait")
        last = index == len(mine) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            with accelerator.autocast():
                nll, _ = answer_loss(model, batch)
            clock.lap("forward")
            # Processes average their gradients, hence the factor `world`.
            accelerator.backward(nll * (world / targets if counts else 0.0))
            clock.lap("backward")
        total += nll.detach() * counts
    return float(accelerator.reduce(total, "sum")) if world > 1 else float(total)


def _guarded_norm(
    model: Any,
    accelerator: Accelerator,
    clip: float | None,
    nll: float,
    chosen: Sequence[np.ndarray],
    hooks: Hooks,
    step: int,
) -> float:
    """Clips the gradient and returns its norm before clipping; refuses a non-finite step."""
    trainable = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = float(torch.nn.utils.clip_grad_norm_(trainable, clip if clip is not None else math.inf))
    if math.isfinite(nll) and math.isfinite(norm):
        return norm
    ids = [example for trees in chosen for example in hooks.ids(trees)]
    what = "loss" if not math.isfinite(nll) else "gradient"
    raise DivergedError(
        f"the {what} of step {step + 1} is not finite; examples: {', '.join(ids[:8])}{' ...' if len(ids) > 8 else ''}",
        "lower finetune.learning_rate, or look at these examples; the last checkpoint is untouched",
        "non_finite",
    )


def _check_moved(before: Mapping[str, bytes], model: Any) -> None:
    _, _, wrong = moved_towers(before, model)
    if wrong:
        raise IntegrityError(f"the frozen parameter {wrong[0]} moved in the first step", "report this as a bug")


def _stop_wanted(stop: StopFlag, accelerator: Accelerator) -> bool:
    if accelerator.num_processes == 1:
        return bool(stop)
    flag = torch.tensor(float(bool(stop)), device=accelerator.device)
    return float(accelerator.reduce(flag, "sum")) > 0


class _Window:
    """Sums since the last line of metrics."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.nll = self.norm = 0.0
        self.targets = self.rows = self.tokens = self.steps = 0
        self.since = time.perf_counter()

    def add(self, nll: float, targets: int, norm: float) -> None:
        self.nll, self.targets = self.nll + nll, self.targets + targets
        self.norm, self.steps = norm, self.steps + 1


def _after_step(
    outcome: Outcome,
    plan: Plan,
    settings: LoopSettings,
    hooks: Hooks,
    window: _Window,
    rate: float,
    model: Any,
) -> None:
    """Metrics, validation and progress after a step."""
    last = outcome.step == plan.total_steps
    row: dict[str, Any] = {}
    if outcome.step % settings.log_every == 0 or last:
        seconds = max(time.perf_counter() - window.since, 1e-9)
        row = {
            "step": outcome.step,
            "loss": window.nll / max(window.targets, 1),
            "learning_rate": rate,
            "grad_norm": window.norm,
            "rows_per_second": round(window.rows / seconds, 2),
            "tokens_per_second": round(window.tokens / seconds, 1),
        }
        window.clear()
    if last or (settings.eval_every and outcome.step % settings.eval_every == 0):
        model.eval()
        value = hooks.validate()
        model.train()
        if value is not None:
            row = {**row, "step": outcome.step, "val_loss": value}
    if row:
        outcome.metrics += json.dumps(row) + "\n"
        hooks.log(row)
    note = f"loss={row['loss']:.4f} lr={rate:.2e} rows/s={row['rows_per_second']}" if "loss" in row else ""
    hooks.advance(1, note)
