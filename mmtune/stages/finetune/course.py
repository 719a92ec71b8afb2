"""The course of finetune: what is shown before it, watched along it, and said of its speed after it."""

from __future__ import annotations

from typing import Any

from mmtune.stages.finetune.preparation import Run
from mmtune.talk import Talk, counted

_FEW_STEPS = 30


def follow(run: Run, resume: str, console: Talk) -> Any:
    """Trains from the newest checkpoint to the last step; returns the loop's outcome.

    Raises:
        DivergedError: Loss or gradient is not finite.
        IntegrityError: The checkpoint belongs to another run.
        Interrupted: A signal came; the state is saved.
    """
    from mmtune.models.spread import is_sharded
    from mmtune.storage import changes
    from mmtune.training.course import end, go_on, standing_of
    from mmtune.training.engine import engine_of
    from mmtune.training.meter import validated
    from mmtune.training.rehearsal import rehearse

    course = _course(run)
    standing = standing_of(course, resume, changes, console.say, console.note, run.also)
    if run.accelerator.is_main_process:
        # Sums of all processes: one of them takes them up.
        run.ledger.restore(standing.sums or {})
    if standing.step < run.train.plan.total_steps:
        largest = rehearse(run.model, engine_of(run.model, run.optimizer), run.train, run.accelerator)
        _show_course(run, largest, standing.step, console)
    trackers = run.settings.trackers
    if trackers:
        run.accelerator.init_trackers("mmtune", config={"seed": run.recipe.seed})

    def log(row: dict[str, Any]) -> None:
        if trackers:
            run.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
        if "val_loss" in row and row["step"] < run.train.plan.total_steps:
            console.say(validated("finetune", row))

    with console.progress(run.train.plan.total_steps, "finetune", done=standing.step) as bar:
        outcome = go_on(course, standing, note=console.note, advance=bar.advance, log=log)
    if trackers:
        run.accelerator.end_training()
    end(course, outcome)
    _say_speed(outcome, run.accelerator.num_processes, is_sharded(run.model), console)
    return outcome


def _course(run: Run) -> Any:
    from mmtune.models.composite.scores import has_auxiliary_loss
    from mmtune.training.course import Course
    from mmtune.training.flops import utilisation_per_token
    from mmtune.training.loop import LoopSettings

    settings = run.settings
    loop = LoopSettings(
        seed=run.recipe.seed,
        peak_rate=settings.learning_rate,
        schedule=settings.schedule,
        warmup=settings.warmup,
        clip=settings.clip,
        save_every=settings.save_every,
        log_every=settings.log_every,
        eval_every=settings.eval_every,
        workers=settings.workers,
        use_per_token=utilisation_per_token(
            run.model, run.accelerator.device, run.accelerator.num_processes, run.train.label_share
        ),
    )
    held_out, checkpoints = run.validate, run.checkpoints
    parts = (run.model, run.optimizer, run.accelerator, run.train, held_out, checkpoints, run.identity, loop)
    ledger, named = run.ledger, bool(settings.task_weights) or has_auxiliary_loss(run.model)

    def keep() -> dict[str, float]:
        run.unfreezing.thaw()
        state: dict[str, float] = ledger.state() if named else {}
        return state

    # Nothing is said of a loss without parts, and the processes need not ask each other.
    said = {"parts": ledger.line, "held_out_parts": ledger.held_out_line, "counted": ledger.counted} if named else {}
    staged = tuple(settings.unfreeze)
    return Course("finetune", *parts, surroundings=run.surroundings, staged=staged, keep=keep, **said)


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
    from mmtune.training.foretold import rate_row, size_rows, step_rows

    plan, world, settings = run.train.plan, run.accelerator.num_processes, run.settings
    rows, units = int(plan.sizes.rows.sum()), plan.sizes.rows.size
    own, apart = run.train.tokens
    saved = 1 - own / apart
    table = [
        ("rows", f"{rows:,}" + (f" in {units:,} trees" if units != rows else "")),
        ("tokens per epoch", f"{own:,}" + (f", {saved:.0%} saved by sharing" if saved >= 0.005 else "")),
        *step_rows(plan, start),
        rate_row(plan, settings.learning_rate, settings.schedule, settings.warmup),
        *size_rows(plan, largest, start, world, run.accelerator.device.type),
    ]
    console.table("the course", ("what", "how much"), table)
    if not start and settings.max_steps is None:
        few = few_steps(plan.total_steps, rows, settings.epochs, plan.micro_batches, settings.batch_rows)
        if few:
            console.note(few)


def few_steps(steps: int, rows: int, epochs: float, micro_batches: int, batch_rows: int | None) -> str:
    """Returns what to do where a run has few steps because they are large; empty where it has not.

    A step takes up to ``batch_tokens`` by default, which is all of a small dataset.

    Args:
        steps: Of the whole run.
        rows: Of an epoch.
        epochs: Of the run.
        micro_batches: Per step, over all processes.
        batch_rows: The limit that is set, if any.
    """
    if steps >= _FEW_STEPS:
        return ""
    smaller = next((size for size in (16, 8, 4) if size * micro_batches * _FEW_STEPS <= rows * epochs), 4)
    wanted = -(-rows // (smaller * micro_batches)) * epochs
    told = f"{counted(steps, 'step')} {'is' if steps == 1 else 'are'} few to learn from"
    if (batch_rows is None or batch_rows > smaller) and wanted >= 2 * steps:
        return f"{told}: finetune.batch_rows={smaller} makes {wanted:,.0f} or more of them"
    return f"{told}: raise finetune.epochs"
