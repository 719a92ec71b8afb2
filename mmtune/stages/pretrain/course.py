"""The course of pretraining: resumed where it stopped, watched, saved, and ended by its last step or a signal."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from mmtune.errors import IntegrityError, Interrupted
from mmtune.stages.pretrain.preparation import Run
from mmtune.talk import Talk


def follow(run: Run, resume: str, console: Talk) -> Any:
    """Trains from the newest checkpoint to the last step; returns the loop's outcome.

    Raises:
        DivergedError: Loss or gradient is not finite.
        IntegrityError: The checkpoint belongs to another run.
        Interrupted: A signal came; the state is saved.
    """
    from mmtune.training.engine import engine_of
    from mmtune.training.loop import LoopSettings, train
    from mmtune.training.rehearsal import rehearse

    start, metrics, sums = _resume_from(run, resume, console)
    settings, plan = run.settings, run.train.plan
    engine = engine_of(run.learner, run.optimizer)
    largest = rehearse(run.learner, engine, run.train, run.accelerator)
    run.learner.tally.line()
    run.learner.tally.restore(sums)
    seconds = largest.seconds * largest.mean_share * plan.micro_batches * (plan.total_steps - start)
    table = [
        ("rows", f"{int(plan.sizes.rows.sum()):,}"),
        ("steps", f"{plan.total_steps:,}" + (f", {start:,} of them done" if start else "")),
        ("objectives", ", ".join(f"{name} {weight:g}" for name, weight in run.learner.settings.weights.items())),
        ("largest micro batch", f"{largest.rows:,} rows, {largest.tokens:,} tokens"),
        ("memory at its peak", f"{largest.peak_bytes / (1 << 30):.2f} GiB"),
        ("time", f"about {timedelta(seconds=round(seconds))} by that batch alone"),
    ]
    console.table("the course", ("what", "how much"), table)
    loop_settings = LoopSettings(
        seed=run.recipe.seed,
        peak_rate=settings.learning_rate,
        schedule=settings.schedule,
        warmup=settings.warmup,
        clip=settings.clip,
        save_every=settings.save_every,
        log_every=settings.log_every,
        eval_every=settings.eval_every,
        workers=0,
    )
    with console.progress(plan.total_steps, "pretrain", done=start) as bar:
        outcome = train(
            run.learner,
            run.optimizer,
            run.accelerator,
            plan,
            loop_settings,
            _hooks(run, console, bar.advance),
            start=start,
            metrics=metrics,
            sums=sums or None,
        )
    if outcome.unseen:
        console.note(f"no row has media for the {' and '.join(sorted(outcome.unseen))} tower; it did not train")
    if outcome.stopped_by:
        error = Interrupted(
            f"stopped by a signal after step {outcome.step} of {plan.total_steps}; the state is saved",
            "run the same command again to go on",
        )
        error.exit_code = 130 if outcome.stopped_by == 2 else 75
        raise error
    return outcome


def _resume_from(run: Run, resume: str, console: Talk) -> tuple[int, str, dict[str, float]]:
    """Puts the newest checkpoint back; returns its step, metrics and the sums since their last line."""
    from mmtune.models.adapter import load_trainable_state
    from mmtune.storage import changes
    from mmtune.training.optimizer import load_optimizer_state

    run.checkpoints.sweep()
    if resume == "never":
        run.checkpoints.clear()
        return 0, "", {}
    checkpoint = run.checkpoints.newest()
    if checkpoint is None:
        return 0, "", {}
    different = changes(checkpoint.identity, run.identity)
    if different:
        raise IntegrityError(
            "the checkpoint on disk belongs to another run: " + "; ".join(different),
            "go back to those settings, or start again: mmtune pretrain --resume never",
            "other_run",
        )
    load_trainable_state(run.learner, run.checkpoints.load(checkpoint, "trainable"))
    load_optimizer_state(run.optimizer, run.learner, run.checkpoints.load(checkpoint, "optimizer"))
    console.say(f"pretrain: resuming after step {checkpoint.step} of {run.train.plan.total_steps}")
    other = changes(checkpoint.surroundings, run.surroundings)
    if other:
        console.note(f"the run goes on as it was but for rounding, under other surroundings: {'; '.join(other)}")
    return checkpoint.step, run.checkpoints.metrics(checkpoint), checkpoint.sums


def _hooks(run: Run, console: Talk, advance: Callable[[int, str], None]) -> Any:
    from mmtune.models.adapter import trainable_state
    from mmtune.training.loop import Hooks
    from mmtune.training.optimizer import optimizer_state
    from mmtune.training.validation import validation_loss

    def save(step: int, metrics: str, sums: dict[str, float]) -> None:
        run.learner.thaw()
        tensors = {
            "trainable": trainable_state(run.learner),
            "optimizer": optimizer_state(run.optimizer, run.learner),
        }
        kept = {**sums, **run.learner.tally.state()}
        run.checkpoints.save(step, tensors, metrics, run.identity, kept, run.surroundings)

    def validate(stopping: Callable[[], bool]) -> float | None:
        if run.validate is None:
            return None
        held_out = run.validate
        return validation_loss(
            run.learner, run.accelerator, held_out.plan, held_out.batches.batch, held_out.loss, stopping=stopping
        )

    return Hooks(
        batch=run.train.batches.batch,
        loss=run.train.loss,
        ids=run.train.batches.ids,
        modalities=run.train.batches.modalities,
        save=save,
        last_good=run.checkpoints.newest_name,
        validate=validate,
        log=lambda row: None,
        note=console.note,
        advance=advance,
        parts=run.learner.tally.line,
    )
