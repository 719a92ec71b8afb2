"""The course of a run: resumed where it stopped, watched, saved, and ended by its last step or a signal."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

from mmtune.errors import IntegrityError, Interrupted
from mmtune.stages.finetune.preparation import Run
from mmtune.talk import Talk


def _resume_from(run: Run, resume: str, console: Talk) -> tuple[int, str, dict[str, float]]:
    """Puts the newest checkpoint back; returns its step, metrics and the sums since their last line."""
    from mmtune.models.adapter import load_trainable_state
    from mmtune.storage import changes
    from mmtune.training.optimizer import load_optimizer_state
    from mmtune.training.ranks import wait_for_all

    if run.accelerator.is_main_process:
        run.checkpoints.sweep()
    if resume == "never":
        if run.accelerator.is_main_process:
            run.checkpoints.clear()
        wait_for_all("clearing old checkpoints")
        return 0, "", {}
    checkpoint = run.checkpoints.newest()
    if checkpoint is None:
        return 0, "", {}
    different = changes(checkpoint.identity, run.identity)
    if different:
        raise IntegrityError(
            "the checkpoint on disk belongs to another run: " + "; ".join(different),
            "go back to those settings (micro batches may change where batch_tokens and batch_rows times accumulate"
            " times processes stay), or start again: mmtune finetune --resume never",
            "other_run",
        )
    load_trainable_state(run.model, run.checkpoints.load(checkpoint, "trainable"))
    load_optimizer_state(run.optimizer, run.model, run.checkpoints.load(checkpoint, "optimizer"))
    console.say(f"finetune: resuming after step {checkpoint.step} of {run.train.plan.total_steps}")
    other = changes(checkpoint.surroundings, run.surroundings)
    if other:
        console.note(f"the run goes on as it was but for rounding, under other surroundings: {'; '.join(other)}")
    return checkpoint.step, run.checkpoints.metrics(checkpoint), checkpoint.sums


def follow(run: Run, resume: str, console: Talk) -> Any:
    """Trains from the newest checkpoint to the last step; returns the loop's outcome.

    Raises:
        DivergedError: Loss or gradient is not finite.
        IntegrityError: The checkpoint belongs to another run.
        Interrupted: A signal came; the state is saved.
    """
    from mmtune.models.spread import is_sharded
    from mmtune.training.engine import engine_of
    from mmtune.training.flops import utilisation_per_token
    from mmtune.training.loop import LoopSettings, train
    from mmtune.training.ranks import wait_for_all
    from mmtune.training.rehearsal import rehearse

    start, metrics, sums = _resume_from(run, resume, console)
    settings, plan = run.settings, run.train.plan
    if start < plan.total_steps:
        largest = rehearse(run.model, engine_of(run.model, run.optimizer), run.train, run.accelerator)
        _show_course(run, largest, start, console)
    if settings.trackers:
        run.accelerator.init_trackers("mmtune", config={"seed": run.recipe.seed})
    loop_settings = LoopSettings(
        seed=run.recipe.seed,
        peak_rate=settings.learning_rate,
        schedule=settings.schedule,
        warmup=settings.warmup,
        clip=settings.clip,
        save_every=settings.save_every,
        log_every=settings.log_every,
        eval_every=settings.eval_every,
        workers=settings.workers,
        use_per_token=utilisation_per_token(run.model, run.accelerator.device, run.accelerator.num_processes),
    )
    with console.progress(plan.total_steps, "finetune", done=start) as bar:
        outcome = train(
            run.model,
            run.optimizer,
            run.accelerator,
            plan,
            loop_settings,
            _hooks(run, console, bar.advance),
            start=start,
            metrics=metrics,
            sums=sums,
        )
    if settings.trackers:
        run.accelerator.end_training()
    if outcome.unseen:
        console.note(f"no row has media for the {' and '.join(sorted(outcome.unseen))} tower; it did not train")
    wait_for_all("ending the run")
    if outcome.stopped_by:
        error = Interrupted(
            f"stopped by a signal after step {outcome.step} of {plan.total_steps}; the state is saved",
            "run the same command again to go on",
        )
        error.exit_code = 130 if outcome.stopped_by == 2 else 75
        raise error
    _say_speed(outcome, run.accelerator.num_processes, is_sharded(run.model), console)
    return outcome


def _say_speed(outcome: Any, processes: int, sharded: bool, console: Talk) -> None:
    from mmtune.training.meter import shares

    spent = outcome.seconds
    seconds = spent["total"] - spent["validate"] - spent["save"]
    if outcome.rows and seconds > 0:
        rate = outcome.rows / seconds
        sync = shares(spent)["sync_share"]
        each = f", {rate / processes:.1f} per process, {sync:.0%} of the time spent on exchanging gradients"
        console.say(f"finetune: {rate:.1f} rows/s{each if processes > 1 else ''}")
    if outcome.teamwork:
        efficiency, balance = outcome.teamwork["scaling_efficiency"], outcome.teamwork["rank_balance"]
        most = "at most " if sharded else ""
        console.say(
            f"finetune: scaling efficiency {most}{efficiency:.0%}: {processes} processes do the work of"
            f" {processes * efficiency:.1f}; their loads are even to {balance:.0%}"
        )


def _show_course(run: Run, largest: Any, start: int, console: Talk) -> None:
    """Prints what will be done, in one table: rows, tokens and what sharing saves of them, steps, time, memory."""
    plan, world = run.train.plan, run.accelerator.num_processes
    rows, units = int(plan.sizes.rows.sum()), plan.sizes.rows.size
    own, apart = run.train.tokens
    per_step = -(-plan.micro_batches // world)
    seconds = largest.seconds * largest.mean_share * per_step * (plan.total_steps - start)
    table = [
        ("rows", f"{rows:,}" + (f" in {units:,} trees" if units != rows else "")),
        ("tokens per epoch", f"{own:,}" + (f", {1 - own / apart:.0%} saved by sharing" if own < apart else "")),
        ("steps", f"{plan.total_steps:,}" + (f", {start:,} of them done" if start else "")),
        ("processes", f"{world} on {run.accelerator.device}"),
        ("largest micro batch", f"{largest.rows:,} rows, {largest.tokens:,} tokens"),
        ("memory at its peak", f"{largest.peak_bytes / (1 << 30):.2f} GiB"),
        ("time", f"about {timedelta(seconds=round(seconds))} by that batch alone"),
    ]
    console.table("the course", ("what", "how much"), table)


def _hooks(run: Run, console: Talk, advance: Callable[[int, str], None]) -> Any:
    from mmtune.models.adapter import trainable_state
    from mmtune.models.spread import is_sharded
    from mmtune.training.loop import Hooks
    from mmtune.training.optimizer import optimizer_state
    from mmtune.training.ranks import wait_for_all

    def save(step: int, metrics: str, sums: dict[str, float]) -> None:
        tensors = {}
        if run.accelerator.is_main_process or is_sharded(run.model):
            tensors = {"trainable": trainable_state(run.model), "optimizer": optimizer_state(run.optimizer, run.model)}
        if run.accelerator.is_main_process:
            run.checkpoints.save(step, tensors, metrics, run.identity, sums, run.surroundings)
        wait_for_all("saving a checkpoint")

    def log(row: dict[str, Any]) -> None:
        if run.settings.trackers:
            run.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    return Hooks(
        batch=run.train.batches.batch,
        loss=run.train.loss,
        ids=run.train.batches.ids,
        modalities=run.train.batches.modalities,
        save=save,
        last_good=run.checkpoints.newest_name,
        validate=lambda stopping: _validation_loss(run, stopping),
        log=log,
        note=console.note,
        advance=advance,
    )


def _validation_loss(run: Run, stopping: Callable[[], bool]) -> float | None:
    """Returns the mean loss per label token on the validation split, or None without one."""
    if run.validate is None:
        return None
    from mmtune.training.engine import engine_of
    from mmtune.training.validation import validation_loss

    held_out, engine = run.validate, engine_of(run.model, run.optimizer)

    def loss(model: Any, batch: Any) -> Any:
        with run.accelerator.autocast():
            return held_out.loss(model, batch)

    return validation_loss(
        run.model,
        run.accelerator,
        held_out.plan,
        held_out.batches.batch,
        lambda model, batch: engine.run(partial(loss, model, batch)),
        stopping=stopping,
    )
