"""The training loop: exact and short.

The loss of a step is the sum over all label tokens of the global batch divided by their
number, whatever the split into micro batches and processes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmtune.training.engine import Plain, engine_of
from mmtune.training.feed import feed, worker_errors
from mmtune.training.guards import Spikes, memory_errors, refuse_non_finite
from mmtune.training.loss import answer_loss
from mmtune.training.meter import Clock, Window, meter_note
from mmtune.training.moved import TowerWatch
from mmtune.training.optimizer import Optimizer, learning_rate, set_rate
from mmtune.training.plan import Plan, step_seed
from mmtune.training.ranks import sum_tensor
from mmtune.training.signals import StopFlag, Stopped
from mmtune.training.zero import Zero

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = Mapping[str, torch.Tensor]
Trees = Sequence[int] | np.ndarray


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """What the loop itself needs to know.

    ``use_per_token`` is as ``flops.utilisation_per_token`` gives it; ``section`` of the recipe is named in advice.
    """

    seed: int
    peak_rate: float
    schedule: str
    warmup: float
    clip: float | None
    save_every: int
    log_every: int
    eval_every: int | None
    workers: int
    use_per_token: float | None = None
    section: str = "finetune"


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Hooks:
    """What the loop calls outward.

    Attributes:
        batch: Tree indices and the step to a padded batch with ``labels``; called from another thread.
        ids: Tree indices to the example ids in them.
        modalities: Tree indices to the kinds of media in them.
        save: ``(step, metrics text, sums that go on)`` writes a checkpoint.
        last_good: Names the last checkpoint in words.
        validate: Returns the validation loss, or None when there is no validation split; asks its argument
            between batches whether to stop, and then raises ``validation.Stopped``.
        log: Receives each metrics row.
        note: Receives a warning.
        advance: ``(steps, note)`` moves the progress.
        loss: ``(model, batch)`` to the summed loss and the number of labels.
        parts: What else stands in a line of metrics, over the steps since the last one; asked on all processes.
        held_out: What else stands beside a validation loss; asked on all processes.
        counted: Told that the last batch counts: it is no repetition that keeps processes in step.
    """

    batch: Callable[[Trees, int], Batch]
    ids: Callable[[Trees], list[str]]
    modalities: Callable[[Trees], set[str]]
    save: Callable[[int, str, dict[str, float]], None]
    last_good: Callable[[], str]
    validate: Callable[[Callable[[], bool]], float | None]
    log: Callable[[dict[str, Any]], None]
    note: Callable[[str], None]
    advance: Callable[[int, str], None]
    loss: Callable[[Any, Batch], tuple[torch.Tensor, int]] = answer_loss
    parts: Callable[[], dict[str, float]] = dict
    held_out: Callable[[], dict[str, float]] = dict
    counted: Callable[[], None] = _nothing


@dataclass
class Outcome:
    """How the loop ended.

    Attributes:
        step: Steps done.
        rows: Rows of all processes that this run trained on.
        stopped_by: Signal number, 0 when it ran to the end.
        metrics: The metrics file's text.
        seconds: Time by part, see ``meter.Clock``.
        unseen: Trained towers that no step could judge, for want of their media.
        teamwork: Of several processes, see ``meter.Teamwork.facts``.
    """

    step: int
    rows: int = 0
    stopped_by: int = 0
    metrics: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    unseen: set[str] = field(default_factory=set)
    teamwork: dict[str, float] = field(default_factory=dict)


def train(
    model: Any,
    optimizer: Optimizer | Zero,
    accelerator: Accelerator,
    plan: Plan,
    settings: LoopSettings,
    hooks: Hooks,
    *,
    start: int = 0,
    metrics: str = "",
    sums: dict[str, float] | None = None,
) -> Outcome:
    """Runs from step ``start`` to the end of the plan, or to a signal.

    The last step is saved too: what comes after it (a validation, moving the weights into their published folder on a
    full disk) may fail or be killed, and then no step is taken twice. It costs what any checkpoint does: little for
    adapters, the weights and their optimizer state for full tuning. Saving comes before validating for the same
    reason; a resumed run takes a validation loss that is due and not there.

    Raises:
        DivergedError: Loss or gradient is not finite; the weights are those of the last good step.
        IntegrityError: A frozen parameter moved, or a tower that trains did not.
        ResourceError: Another process of the run is gone or stuck, or one that makes batches was killed.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    steps, early = itertools.tee(plan.steps(start))
    mine = (
        (chosen[position], step)
        for step, chosen in enumerate(early, start=start)
        for position, _ in plan.shares(chosen, rank, world)
    )
    outcome, clock, window, spikes = Outcome(start, metrics=metrics), Clock(), Window(), Spikes()
    watch, engine = TowerWatch(model, settings.section), engine_of(model, optimizer)
    if sums:
        window.restore(sums)
        spikes.restore(sums)
    saved = start
    model.train()
    made = feed(lambda named: hooks.batch(*named), mine, settings.workers)
    with worker_errors(), closing(made) as batches, StopFlag() as stop:
        if start and not _validate(outcome, plan, settings, hooks, clock, window, model, accelerator, stop):
            return _stopped(outcome, clock, stop)
        for step, chosen in enumerate(steps, start=start):
            rate = learning_rate(
                step,
                peak=settings.peak_rate,
                total=plan.total_steps,
                warmup=settings.warmup,
                schedule=settings.schedule,
            )
            set_rate(optimizer, rate)
            _seed(step_seed(settings.seed, step, rank), accelerator.device)
            clock.skip()
            losses = _accumulate(
                model, engine, accelerator, plan, chosen, batches, hooks, clock, window, settings.section
            )
            norm = engine.norm(settings.clip)
            refuse_non_finite(
                losses,
                norm,
                chosen,
                step=step,
                ids=hooks.ids,
                last_good=hooks.last_good(),
                section=settings.section,
            )
            with memory_errors(np.concatenate(chosen), hooks.ids, settings.section):
                engine.step()
            clock.lap("optimizer")
            outcome.step = step + 1
            outcome.rows += int(sum(plan.sizes.rows[own].sum() for own in chosen))
            targets = plan.targets(chosen)
            if step == start or watch.waiting:
                kinds = set().union(*(hooks.modalities(trees) for trees in chosen))
                watch.check(model, rate=rate, targets=targets, modalities=kinds, device=str(accelerator.device))
            _warn_of_spike(spikes, losses, targets, chosen, step, hooks)
            window.add(sum(losses), targets, norm)
            _log(outcome, plan, settings, hooks, window, clock, rate, accelerator)
            last = outcome.step == plan.total_steps
            if last or outcome.step % settings.save_every == 0:
                saved = _save(outcome, hooks, clock, window, spikes)
            validated = _validate(outcome, plan, settings, hooks, clock, window, model, accelerator, stop)
            if not validated or (not last and _stop_wanted(stop, accelerator)):
                if saved < outcome.step:
                    _save(outcome, hooks, clock, window, spikes)
                return _stopped(outcome, clock, stop)
    outcome.seconds, outcome.teamwork = clock.stop(), clock.teamwork.facts()
    outcome.unseen = watch.waiting if outcome.step > start else set()
    return outcome


def _seed(seed: int, device: torch.device) -> None:
    """Seeds what a step draws; without a GPU, ``torch.manual_seed`` formats a traceback for every kind of device."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _save(outcome: Outcome, hooks: Hooks, clock: Clock, window: Window, spikes: Spikes) -> int:
    """Writes a checkpoint; returns its step."""
    clock.skip()
    hooks.save(outcome.step, outcome.metrics, {**window.state(), **spikes.state()})
    window.leave_out(clock.lap("save"))
    return outcome.step


def _stopped(outcome: Outcome, clock: Clock, stop: StopFlag) -> Outcome:
    outcome.seconds, outcome.stopped_by = clock.stop(), stop.wanted or 15
    return outcome


def _accumulate(
    model: Any,
    engine: Plain | Zero,
    accelerator: Accelerator,
    plan: Plan,
    chosen: Sequence[np.ndarray],
    batches: Iterator[Batch],
    hooks: Hooks,
    clock: Clock,
    window: Window,
    section: str,
) -> list[float]:
    """Forward and backward over one step's micro batches; returns the global loss sum of each."""
    world, rank = accelerator.num_processes, accelerator.process_index
    targets, own = max(plan.targets(chosen), 1), plan.shares(chosen, rank, world)
    # The losses of the step, then each process's own seconds: one exchange for both.
    shared = torch.zeros(len(chosen) + world, device=accelerator.device)

    def loss_of(batch: Batch) -> torch.Tensor:
        with accelerator.autocast():
            return hooks.loss(model, batch)[0]

    for index, (position, counts) in enumerate(own, start=1):
        made, trees = next(batches), chosen[position]
        window.rows += int(plan.sizes.rows[trees].sum()) * counts
        window.tokens += int(made["attention_mask"].sum()) * counts
        with memory_errors(trees, hooks.ids, section):
            batch = {name: value.to(accelerator.device) for name, value in made.items()}
            clock.lap("wait")
            nll = engine.run(partial(loss_of, batch))
            clock.lap("forward")
            # Rows without media do not reach a tower that trains alone. Where the processes gather weights
            # from each other, one with nothing to add takes part too.
            if nll.requires_grad and (counts or engine.together):
                engine.backward(nll / targets * float(counts), last=index == len(own))
        clock.lap("backward")
        if counts:
            shared[position] = nll.detach()
            hooks.counted()
    if world > 1 and accelerator.device.type == "cuda":
        # What is still queued is own work, not the exchange.
        torch.cuda.synchronize(accelerator.device)
        clock.lap("backward")
    shared[len(chosen) + rank] = clock.own()
    engine.exchange()
    shared_by_all = sum_tensor(shared, "summing the loss").tolist()
    exchange = clock.lap("sync")
    if world > 1:
        clock.teamwork.add(shared_by_all[len(chosen) :], rank, exchange)
    return shared_by_all[: len(chosen)]


def _warn_of_spike(
    spikes: Spikes, losses: Sequence[float], targets: int, chosen: Sequence[np.ndarray], step: int, hooks: Hooks
) -> None:
    loss = sum(losses) / max(targets, 1)
    usual = spikes.over(loss)
    if usual is not None:
        worst = hooks.ids(chosen[int(np.argmax(losses))])
        hooks.note(
            f"the loss of step {step + 1} is {loss:.3f}, around {usual:.3f} before; examples of its worst micro batch:"
            f" {', '.join(worst[:4])}{' ...' if len(worst) > 4 else ''}"
        )


def _stop_wanted(stop: StopFlag, accelerator: Accelerator) -> bool:
    if accelerator.num_processes == 1:
        return bool(stop)
    flag = torch.tensor(float(bool(stop)), device=accelerator.device)
    return float(sum_tensor(flag, "asking whether to stop")) > 0


def _log(
    outcome: Outcome,
    plan: Plan,
    settings: LoopSettings,
    hooks: Hooks,
    window: Window,
    clock: Clock,
    rate: float,
    accelerator: Accelerator,
) -> None:
    """Metrics and progress after a step."""
    note = ""
    if outcome.step % settings.log_every == 0 or outcome.step == plan.total_steps:
        counts = torch.tensor([window.rows, window.tokens], device=accelerator.device)
        window.rows, window.tokens = sum_tensor(counts, "counting rows").tolist()
        row = window.line(outcome.step, rate, clock.spent["wait"])
        row |= hooks.parts()
        if settings.use_per_token is not None:
            row["mfu"] = round(row["tokens_per_second"] * settings.use_per_token, 4)
        outcome.metrics += json.dumps(row) + "\n"
        hooks.log(row)
        note = meter_note(row)
    hooks.advance(1, note)


def _validate(
    outcome: Outcome,
    plan: Plan,
    settings: LoopSettings,
    hooks: Hooks,
    clock: Clock,
    window: Window,
    model: Any,
    accelerator: Accelerator,
    stop: StopFlag,
) -> bool:
    """Adds the validation loss to the metrics where one is due and not there yet; False when a signal stopped it."""
    step = outcome.step
    due = step == plan.total_steps or (settings.eval_every is not None and step % settings.eval_every == 0)
    lines = outcome.metrics.splitlines()
    row = json.loads(lines[-1]) if lines else {}
    same = row.get("step") == step
    if not due or (same and "val_loss" in row):
        return True
    clock.skip()
    model.eval()
    try:
        value = hooks.validate(lambda: _stop_wanted(stop, accelerator))
    except Stopped:
        return False
    finally:
        model.train()
        window.leave_out(clock.lap("validate"))
    if value is not None:
        found = {"val_loss": value, **hooks.held_out()}
        row = {**(row if same else {}), "step": step, **found}
        outcome.metrics = "".join(f"{line}\n" for line in [*(lines[:-1] if same else lines), json.dumps(row)])
        hooks.log({"step": step, **found})
    return True
