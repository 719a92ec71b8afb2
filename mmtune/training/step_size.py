"""How much makes a step, and who may change what of it while a run is stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

LIMITS = ("batch_tokens", "batch_rows", "batch_media_tokens")
"""The limits of a micro batch, by their names in a recipe."""


@dataclass(frozen=True, slots=True)
class StepSize:
    """A step is so many micro batches, each of at most so much.

    Attributes:
        micro_batches: Over all processes.
        batch_tokens: Most tokens of a micro batch, padding included.
        batch_rows: Most rows of a micro batch, or None.
        batch_media_tokens: Most media tokens of a micro batch, or None.
    """

    micro_batches: int
    batch_tokens: int
    batch_rows: int | None = None
    batch_media_tokens: int | None = None

    def limits(self) -> dict[str, int | None]:
        """Returns the limits of a micro batch by name."""
        return {name: getattr(self, name) for name in LIMITS}

    def _whole(self) -> tuple[int, int | None]:
        rows = None if self.batch_rows is None else self.micro_batches * self.batch_rows
        return self.micro_batches * self.batch_tokens, rows

    def is_as_large_as(self, other: StepSize) -> bool:
        """Says whether as many tokens and rows make a step, in whatever micro batches."""
        return self._whole() == other._whole()

    def in_micro_batches(self, count: int) -> StepSize | None:
        """Returns a step as large in so many micro batches; None where it does not come out even."""
        tokens, rows = self._whole()
        if tokens % count or (rows is not None and rows % count):
            return None
        return StepSize(count, tokens // count, None if rows is None else rows // count, self.batch_media_tokens)

    def micro_batches_like(self, other: StepSize) -> int | None:
        """Returns how many micro batches of another size make a step as large; None where none do."""
        count = self.micro_batches * self.batch_tokens // other.batch_tokens
        like = replace(other, micro_batches=count)
        return count if like.is_as_large_as(self) else None


def planned_size(own: StepSize, identity: Mapping[str, Any] | None) -> StepSize:
    """Returns the size by which a run plans its steps.

    A run that goes on from a checkpoint plans as the run that wrote it did, as long as its steps are as large: so
    the examples come in the same order. What does not fit its own micro batches it cuts into smaller ones.

    Args:
        own: What the recipe and the processes give.
        identity: Of the checkpoint to go on from, or None.
    """
    before = StepSize(**identity["step_size"]) if identity and "step_size" in identity else own
    return before if before.is_as_large_as(own) else own
