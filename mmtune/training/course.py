"""The course of a run, whatever it trains: gone on with where it stopped, watched, saved, and ended."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from mmtune.errors import IntegrityError, Interrupted
from mmtune.models.adapter import load_trainable_state, trainable_state
from mmtune.models.fused_parts import fused_parts
from mmtune.models.spread import is_sharded
from mmtune.signals import exit_code_of
from mmtune.training.engine import engine_of
from mmtune.training.loop import Hooks, LoopSettings, Outcome, train
from mmtune.training.optimizer import load_optimizer_state, optimizer_state
from mmtune.training.ranks import wait_for_all
from mmtune.training.validation import validation_loss

if TYPE_CHECKING:
    from mmtune.training.batching import Batching
    from mmtune.training.checkpoints import CheckpointFolder


@dataclass(frozen=True)
class Course:
    """What one process needs to train, and to go on with it another time.

    Attributes:
        command: The command, and the section of the recipe that steers it.
        model: What trains.
        optimizer: Over its trainable parameters.
        accelerator: The accelerator.
        train: The batches of the training split.
        held_out: Those of the validation split, or None.
        checkpoints: Where they stand.
        identity: What a checkpoint must share with this run.
        settings: Of the loop.
        surroundings: What may change between two checkpoints, and change the rounding with it.
        parts: See ``Hooks.parts``.
        held_out_parts: See ``Hooks.held_out``.
        staged: Towers that start frozen, and may stay so to the end.
        counted: See ``Hooks.counted``.
        keep: Called by every process before a checkpoint is written; returns more sums for it.
    """

    command: str
    model: Any
    optimizer: Any
    accelerator: Any
    train: Batching
    held_out: Batching | None
    checkpoints: CheckpointFolder
    identity: dict[str, Any]
    settings: LoopSettings
    surroundings: Mapping[str, Any] = field(default_factory=dict)
    parts: Callable[[], dict[str, float]] = dict
    held_out_parts: Callable[[], dict[str, float]] = dict
    staged: Collection[str] = ()
    counted: Callable[[], None] = lambda: None
    keep: Callable[[], dict[str, float]] = dict


@dataclass(frozen=True)
class Standing:
    """How far a run has come.

    Attributes:
        step: Steps done.
        metrics: Its lines of metrics.
        sums: Since the last of these lines.
    """

    step: int = 0
    metrics: str = ""
    sums: Mapping[str, float] | None = None


def check_same_run(different: Sequence[str], command: str, also: str = "") -> None:
    """Refuses to go on from the checkpoint of another run.

    Args:
        different: What differs between the two, in words.
        command: The command that trains.
        also: As of ``standing_of``.

    Raises:
        IntegrityError: Something differs.
    """
    if different:
        raise IntegrityError(
            "the checkpoint on disk belongs to another run: " + "; ".join(different),
            f"go back to those settings{also}, or start again: mmtune {command} --resume never",
            "other_run",
        )


def standing_of(
    course: Course,
    resume: str,
    differences: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]],
    say: Callable[[str], None],
    note: Callable[[str], None],
    also: str = "",
) -> Standing:
    """Returns where the run stands, the newest checkpoint put back into model and optimizer.

    Args:
        course: The run.
        resume: ``auto``, or ``never``: start anew, and remove the checkpoints.
        differences: What differs between two identities, in words.
        say: Told that the run goes on.
        note: Told under which other surroundings.
        also: Added to the advice to go back to the settings of a checkpoint.

    Raises:
        IntegrityError: The checkpoint belongs to another run, or is damaged.
    """
    if course.accelerator.is_main_process:
        course.checkpoints.sweep()
    if resume == "never":
        if course.accelerator.is_main_process:
            course.checkpoints.clear()
        wait_for_all("clearing old checkpoints")
        return Standing()
    checkpoint = course.checkpoints.newest()
    if checkpoint is None:
        return Standing()
    check_same_run(differences(checkpoint.identity, course.identity), course.command, also)
    load_trainable_state(course.model, course.checkpoints.load(checkpoint, "trainable"))
    load_optimizer_state(course.optimizer, course.model, course.checkpoints.load(checkpoint, "optimizer"))
    say(f"{course.command}: resuming after step {checkpoint.step} of {course.train.plan.total_steps}")
    other = differences(checkpoint.surroundings, course.surroundings)
    if other:
        note(f"the run goes on as it was but for rounding, under other surroundings: {'; '.join(other)}")
    return Standing(checkpoint.step, course.checkpoints.metrics(checkpoint), checkpoint.sums)


def go_on(
    course: Course,
    standing: Standing,
    *,
    note: Callable[[str], None],
    advance: Callable[[int, str], None],
    log: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Outcome:
    """Trains from where the run stands to its last step, or to a signal; returns the loop's outcome.

    Args:
        course: The run.
        standing: From ``standing_of``.
        note: Receives a warning.
        advance: ``(steps, note)`` moves the progress.
        log: Receives each line of metrics.

    Raises:
        DivergedError: Loss or gradient is not finite.
    """
    hooks = Hooks(
        batch=course.train.batches.batch,
        loss=course.train.loss,
        ids=course.train.batches.ids,
        modalities=course.train.batches.modalities,
        save=partial(_save, course),
        last_good=course.checkpoints.newest_name,
        validate=partial(_validation_loss, course),
        log=log,
        note=note,
        advance=advance,
        parts=course.parts,
        held_out=course.held_out_parts,
        counted=course.counted,
    )
    with fused_parts(course.model):
        outcome = train(
            course.model,
            course.optimizer,
            course.accelerator,
            course.train.plan,
            course.settings,
            hooks,
            start=standing.step,
            metrics=standing.metrics,
            sums=dict(standing.sums or {}) or None,
        )
    unseen = sorted(outcome.unseen - set(course.staged))
    if unseen:
        note(f"no row has media for the {' and '.join(unseen)} tower; it did not train")
    return outcome


def end(course: Course, outcome: Outcome) -> None:
    """Returns when all processes have come to the end of the run.

    Raises:
        Interrupted: A signal ended it; the state is saved.
    """
    wait_for_all("ending the run")
    if outcome.stopped_by:
        error = Interrupted(
            f"stopped by a signal after step {outcome.step} of {course.train.plan.total_steps}; the state is saved",
            "run the same command again to go on",
        )
        error.exit_code = exit_code_of(outcome.stopped_by)
        raise error


def _save(course: Course, step: int, metrics: str, sums: dict[str, float]) -> None:
    more, main = course.keep(), course.accelerator.is_main_process
    tensors = {}
    if main or is_sharded(course.model):
        tensors = {
            "trainable": trainable_state(course.model),
            "optimizer": optimizer_state(course.optimizer, course.model),
        }
    if main:
        course.checkpoints.save(step, tensors, metrics, course.identity, {**sums, **more}, course.surroundings)
    wait_for_all("saving a checkpoint")


def _validation_loss(course: Course, stopping: Callable[[], bool]) -> float | None:
    """Returns the mean loss per label token on the validation split, or None without one."""
    if course.held_out is None:
        return None
    held_out, engine = course.held_out, engine_of(course.model, course.optimizer)

    def loss(model: Any, batch: Any) -> Any:
        with course.accelerator.autocast():
            return held_out.loss(model, batch)

    return validation_loss(
        course.model,
        course.accelerator,
        held_out.plan,
        held_out.batches.batch,
        lambda model, batch: engine.run(partial(loss, model, batch)),
        stopping=stopping,
        counted=course.counted,
    )
