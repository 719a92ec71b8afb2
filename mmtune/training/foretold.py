"""The course of a run before its first step, as rows of a table: steps, what makes one, the learning rate, time."""

from __future__ import annotations

from datetime import timedelta

from mmtune.training.optimizer import warm_steps
from mmtune.training.plan import Plan
from mmtune.training.rehearsal import Rehearsal


def step_rows(plan: Plan, start: int) -> list[tuple[str, str]]:
    """Returns how many steps there are and what a mean one of them holds, of all processes together.

    Args:
        plan: Of the run.
        start: Steps that are done already.
    """
    batches = len(plan.epoch_batches(0))
    per_epoch = -(-batches // plan.micro_batches)
    epochs = plan.epochs if plan.max_steps is None else plan.total_steps / per_epoch
    done = f"; {start:,} of them done" if start else ""
    rows, targets = plan.sizes.rows.sum() / per_epoch, plan.sizes.targets.sum() / per_epoch
    apart = f", in {plan.micro_batches} micro batches" if plan.micro_batches > 1 else ""
    return [
        ("steps", f"{plan.total_steps:,} in {_short(epochs)} epoch{'' if _short(epochs) == '1' else 's'}{done}"),
        ("effective batch", f"{_short(rows)} rows with {targets:,.0f} answer tokens on average{apart}"),
    ]


def rate_row(plan: Plan, peak: float, schedule: str, warmup: float) -> tuple[str, str]:
    """Returns the learning rate along the steps, in words."""
    warm = warm_steps(warmup, plan.total_steps)
    after = f" after {warm:,} step{'' if warm == 1 else 's'} of warm-up" if warm else ""
    return "learning rate", f"{peak:g}, {schedule}{after}"


def size_rows(plan: Plan, largest: Rehearsal, start: int, processes: int, device: str) -> list[tuple[str, str]]:
    """Returns where the run takes place, its largest micro batch, and memory and time by that."""
    per_step = -(-plan.micro_batches // processes)
    seconds = largest.seconds * largest.mean_share * per_step * (plan.total_steps - start)
    return [
        ("processes", f"{processes} on {device}"),
        ("largest micro batch", f"{largest.rows:,} row{'' if largest.rows == 1 else 's'}, {largest.tokens:,} tokens"),
        ("memory at its peak", f"{largest.peak_bytes / (1 << 30):.2f} GiB"),
        ("time", f"about {timedelta(seconds=round(seconds))}, judging by that batch"),
    ]


def _short(number: float) -> str:
    """Returns a number with one decimal where that is not 0."""
    return f"{number:,.1f}".removesuffix(".0")
