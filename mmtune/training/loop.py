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

from mmtune.training.engine import engine_of
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
    # Planned once, for the steps and for those who make their batches ahead.
    steps, early = itertools.tee(plan.steps(start))
    mine = (
        (chosen[position], step)
        for step, chosen in enumerate(early, start=start)
        for position, _ in plan.shares(chosen, rank, world)
    )
    model.train()
    made = feed(lambda named: hooks.batch(*named), mine, settings.workers)
    with worker_errors(), closing(made) as batches, StopFlag() as stop:
        loop = Loop(
            model, optimizer, accelerator, plan, settings, hooks, batches, stop, Outcome(start, metrics=metrics)
        )
        if sums:
            loop.restore(sums)
        return loop.run(steps, start)


class Loop:
    """One run of the loop: what stands for all its steps, and what they add up to.

    Attributes:
        model: What trains.
        accelerator: The accelerator.
        plan: The steps.
        hooks: What is called outward.
        outcome: How far it is.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Optimizer | Zero,
        accelerator: Accelerator,
        plan: Plan,
        settings: LoopSettings,
        hooks: Hooks,
        batches: Iterator[Batch],
        stop: StopFlag,
        outcome: Outcome,
    ) -> None:
        self.model, self._optimizer, self._engine = model, optimizer, engine_of(model, optimizer)
        self.accelerator, self.plan, self._settings, self.hooks = accelerator, plan, settings, hooks
        self._batches, self._stop, self.outcome = batches, stop, outcome
        self._clock, self._window, self._spikes = Clock(), Window(), Spikes()
        self._watch, self._saved = TowerWatch(model, settings.section), outcome.step

    def restore(self, sums: dict[str, float]) -> None:
        """Goes on with the sums of a checkpoint."""
        self._window.restore(sums)
        self._spikes.restore(sums)

    def run(self, steps: Iterator[list[np.ndarray]], start: int) -> Outcome:
        """Takes the steps of the plan, the first of which is ``start``; returns how it ended."""
        outcome = self.outcome
        if start and not self._validate():
            return self._stopped()
        for step, chosen in enumerate(steps, start=start):
            self._take(step, chosen, first=step == start)
            last = outcome.step == self.plan.total_steps
            if last or outcome.step % self._settings.save_every == 0:
                self._save()
            if not self._validate() or (not last and self.stop_wanted()):
                if self._saved < outcome.step:
                    self._save()
                return self._stopped()
        outcome.seconds, outcome.teamwork = self._clock.stop(), self._clock.teamwork.facts()
        outcome.unseen = self._watch.waiting if outcome.step > start else set()
        return outcome

    def _take(self, step: int, chosen: Sequence[np.ndarray], *, first: bool) -> None:
        """Takes one step: its gradients, whether they can be trusted, the weights, and what is to be said of it."""
        settings, hooks, plan, outcome = self._settings, self.hooks, self.plan, self.outcome
        rate = learning_rate(
            step,
            peak=settings.peak_rate,
            total=plan.total_steps,
            warmup=settings.warmup,
            schedule=settings.schedule,
        )
        set_rate(self._optimizer, rate)
        _seed(step_seed(settings.seed, step, self.accelerator.process_index), self.accelerator.device)
        self._clock.skip()
        losses = self.accumulate(chosen)
        norm = self._engine.norm(settings.clip)
        refuse_non_finite(
            losses, norm, chosen, step=step, ids=hooks.ids, last_good=hooks.last_good(), section=settings.section
        )
        with memory_errors(np.concatenate(chosen), hooks.ids, settings.section):
            self._engine.step()
        self._clock.lap("optimizer")
        outcome.step = step + 1
        outcome.rows += int(sum(plan.sizes.rows[own].sum() for own in chosen))
        targets = plan.targets(chosen)
        if first or self._watch.waiting:
            kinds = set().union(*(hooks.modalities(trees) for trees in chosen))
            device = str(self.accelerator.device)
            self._watch.check(self.model, rate=rate, targets=targets, modalities=kinds, device=device)
        self.warn_of_spike(losses, targets, chosen)
        self._window.add(sum(losses), targets, norm)
        self._log(rate)

    def accumulate(self, chosen: Sequence[np.ndarray]) -> list[float]:
        """Forward and backward over one step's micro batches; returns the global loss sum of each."""
        device, plan, clock, window = self.accelerator.device, self.plan, self._clock, self._window
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        targets, own = max(plan.targets(chosen), 1), plan.shares(chosen, rank, world)
        # The losses of the step, then each process's own seconds: one exchange for both.
        shared = torch.zeros(len(chosen) + world, device=device)
        for index, (position, counts) in enumerate(own, start=1):
            made, trees = next(self._batches), chosen[position]
            window.rows += int(plan.sizes.rows[trees].sum()) * counts
            window.tokens += int(made["attention_mask"].sum()) * counts
            with memory_errors(trees, self.hooks.ids, self._settings.section):
                batch = {name: value.to(device) for name, value in made.items()}
                clock.lap("wait")
                nll = self._engine.run(partial(self._loss, batch))
                clock.lap("forward")
                # Rows without media do not reach a tower that trains alone. Where the processes gather weights
                # from each other, one with nothing to add takes part too.
                if nll.requires_grad and (counts or self._engine.together):
                    self._engine.backward(nll / targets * float(counts), last=index == len(own))
            clock.lap("backward")
            if counts:
                shared[position] = nll.detach()
                self.hooks.counted()
        if world > 1 and device.type == "cuda":
            # What is still queued is own work, not the exchange.
            torch.cuda.synchronize(device)
            clock.lap("backward")
        shared[len(chosen) + rank] = clock.own()
        self._engine.exchange()
        shared_by_all = sum_tensor(shared, "summing the loss").tolist()
        exchange = clock.lap("sync")
        if world > 1:
            clock.teamwork.add(shared_by_all[len(chosen) :], rank, exchange)
        return shared_by_all[: len(chosen)]

    def _loss(self, batch: Batch) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.hooks.loss(self.model, batch)[0]

    def warn_of_spike(self, losses: Sequence[float], targets: int, chosen: Sequence[np.ndarray]) -> None:
        """Says which examples were in the worst micro batch of a step whose loss leapt."""
        loss = sum(losses) / max(targets, 1)
        usual = self._spikes.over(loss)
        if usual is not None:
            worst = self.hooks.ids(chosen[int(np.argmax(losses))])
            self.hooks.note(
                f"the loss of step {self.outcome.step} is {loss:.3f}, around {usual:.3f} before; examples of its worst"
                f" micro batch: {', '.join(worst[:4])}{' ...' if len(worst) > 4 else ''}"
            )

    def _log(self, rate: float) -> None:
        """Metrics and progress after a step."""
        settings, window, outcome, note = self._settings, self._window, self.outcome, ""
        if outcome.step % settings.log_every == 0 or outcome.step == self.plan.total_steps:
            counts = torch.tensor([window.rows, window.tokens], device=self.accelerator.device)
            window.rows, window.tokens = sum_tensor(counts, "counting rows").tolist()
            row = window.line(outcome.step, rate, self._clock.spent["wait"])
            row |= self.hooks.parts()
            if settings.use_per_token is not None:
                row["mfu"] = round(row["tokens_per_second"] * settings.use_per_token, 4)
            outcome.metrics += json.dumps(row) + "\n"
            self.hooks.log(row)
            note = meter_note(row)
        self.hooks.advance(1, note)

    def _save(self) -> None:
        """Writes a checkpoint."""
        self._clock.skip()
        self.hooks.save(self.outcome.step, self.outcome.metrics, {**self._window.state(), **self._spikes.state()})
        self._window.leave_out(self._clock.lap("save"))
        self._saved = self.outcome.step

    def _validate(self) -> bool:
        """Adds the validation loss to the metrics where one is due and not there yet; False: a signal stopped it."""
        outcome, every = self.outcome, self._settings.eval_every
        step = outcome.step
        due = step == self.plan.total_steps or (every is not None and step % every == 0)
        lines = outcome.metrics.splitlines()
        row = json.loads(lines[-1]) if lines else {}
        same = row.get("step") == step
        if not due or (same and "val_loss" in row):
            return True
        self._clock.skip()
        self.model.eval()
        try:
            value = self.hooks.validate(self.stop_wanted)
        except Stopped:
            return False
        finally:
            self.model.train()
            self._window.leave_out(self._clock.lap("validate"))
        if value is not None:
            found = {"val_loss": value, **self.hooks.held_out()}
            row = {**(row if same else {}), "step": step, **found}
            outcome.metrics = "".join(f"{line}\n" for line in [*(lines[:-1] if same else lines), json.dumps(row)])
            self.hooks.log({"step": step, **found})
        return True

    def stop_wanted(self) -> bool:
        """Whether any process was asked to stop."""
        if self.accelerator.num_processes == 1:
            return bool(self._stop)
        flag = torch.tensor(float(bool(self._stop)), device=self.accelerator.device)
        return float(sum_tensor(flag, "asking whether to stop")) > 0

    def _stopped(self) -> Outcome:
        self.outcome.seconds, self.outcome.stopped_by = self._clock.stop(), self._stop.wanted or 15
        return self.outcome


def _seed(seed: int, device: torch.device) -> None:
    """Seeds what a step draws; without a GPU, ``torch.manual_seed`` formats a traceback for every kind of device."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
