"""The course of pretrain: what is shown before it, and how it is watched."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from mmtune.stages.pretrain.preparation import Run
from mmtune.talk import Talk, counted


def follow(run: Run, resume: str, console: Talk) -> Any:
    """Trains from the newest checkpoint to the last step; returns the loop's outcome.

    Raises:
        DivergedError: Loss or gradient is not finite.
        IntegrityError: The checkpoint belongs to another run.
        Interrupted: A signal came; the state is saved.
    """
    from mmtune.storage import changes
    from mmtune.training.course import end, go_on, standing_of
    from mmtune.training.engine import engine_of
    from mmtune.training.rehearsal import rehearse

    course = _course(run)
    standing = standing_of(course, resume, changes, console.say, console.note, _also(run))
    if run.accelerator.is_main_process:
        # Sums of all processes: one of them takes them up.
        run.learner.ledger.restore(standing.sums or {})
    if standing.step < run.train.plan.total_steps:
        engine = engine_of(run.learner, run.optimizer)
        largest = rehearse(run.learner, engine, run.train, run.accelerator, "pretrain")
        _show_course(run, largest, standing.step, console)
    with console.progress(run.train.plan.total_steps, "pretrain", done=standing.step) as bar:
        outcome = go_on(course, standing, note=console.note, advance=bar.advance)
    end(course, outcome)
    return outcome


def _also(run: Run) -> str:
    return " (accumulate may change where accumulate times processes stays)" if run.settings.accumulate > 1 else ""


def _course(run: Run) -> Any:
    from mmtune.training.course import Course
    from mmtune.training.loop import LoopSettings

    settings, learner = run.settings, run.learner
    loop = LoopSettings(
        seed=run.recipe.seed,
        peak_rate=settings.learning_rate,
        schedule=settings.schedule,
        warmup=settings.warmup,
        clip=settings.clip,
        save_every=settings.save_every,
        log_every=settings.log_every,
        eval_every=settings.eval_every,
        workers=0,
        section="pretrain",
    )

    def keep() -> dict[str, float]:
        learner.thaw()
        state: dict[str, float] = learner.ledger.state()
        return state

    held_out, checkpoints = run.validate, run.checkpoints
    parts = (learner, run.optimizer, run.accelerator, run.train, held_out, checkpoints, run.identity, loop)
    return Course(
        "pretrain",
        *parts,
        surroundings=run.surroundings,
        parts=learner.ledger.line,
        held_out_parts=learner.ledger.held_out_line,
        staged=tuple(learner.settings.frozen_steps),
        counted=learner.ledger.counted,
        keep=keep,
    )


def _show_course(run: Run, largest: Any, start: int, console: Talk) -> None:
    """Prints what will be done, in one table."""
    plan, world = run.train.plan, run.accelerator.num_processes
    per_step = -(-plan.micro_batches // world)
    seconds = largest.seconds * largest.mean_share * per_step * (plan.total_steps - start)
    table = [
        ("rows", f"{int(plan.sizes.rows.sum()):,}"),
        ("steps", f"{plan.total_steps:,}" + (f", {start:,} of them done" if start else "")),
        ("objectives", ", ".join(f"{name} {weight:g}" for name, weight in run.learner.settings.weights.items())),
        ("processes", f"{world} on {run.accelerator.device.type}"),
        ("largest micro batch", f"{counted(largest.rows, 'row')}, {counted(largest.tokens, 'token')}"),
        ("memory at its peak", f"{largest.peak_bytes / (1 << 30):.2f} GiB"),
        ("time", f"about {timedelta(seconds=round(seconds))} by that batch alone"),
    ]
    console.table("the course", ("what", "how much"), table)
