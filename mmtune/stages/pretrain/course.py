"""The course of pretrain: what is shown before it, and how it is watched."""

from __future__ import annotations

from typing import Any

from mmtune.stages.pretrain.preparation import Run
from mmtune.talk import Talk


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
    from mmtune.training.meter import validated
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

        def log(row: dict[str, Any]) -> None:
            if "val_loss" in row and row["step"] < run.train.plan.total_steps:
                console.say(validated("pretrain", row))

        outcome = go_on(course, standing, note=console.note, advance=bar.advance, log=log)
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
    from mmtune.training.foretold import rate_row, size_rows, step_rows

    plan, settings, weights = run.train.plan, run.settings, run.learner.settings.weights
    table = [
        ("rows", f"{int(plan.sizes.rows.sum()):,}"),
        *step_rows(plan, start),
        ("objectives", ", ".join(f"{name} {weight:g}" for name, weight in weights.items())),
        rate_row(plan, settings.learning_rate, settings.schedule, settings.warmup),
        *size_rows(plan, largest, start, run.accelerator.num_processes, run.accelerator.device.type),
    ]
    console.table("the course", ("what", "how much"), table)
