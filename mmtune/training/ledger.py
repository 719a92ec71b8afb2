"""What is said of batches beside their loss, between two lines of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from mmtune.training.ranks import sum_numbers
from mmtune.training.tally import Numbers, Tally

Said = Sequence[tuple[Numbers, float]]
"""Numbers by name, and what the batch counts for them."""


class Ledger:
    """Means of named numbers over training steps, and over held-out rows.

    What a batch says waits until the batch is ``counted``: one that only keeps processes in step is not.
    """

    def __init__(self) -> None:
        self._tally, self._held_out = Tally(), Tally()
        self._pending: tuple[Tally, Said] = self._tally, []

    def say(self, said: Said, *, training: bool) -> None:
        """Takes what a batch says of itself, of the training rows or of the held-out ones."""
        self._pending = self._tally if training else self._held_out, said

    def counted(self) -> None:
        """Lets what the last batch said count."""
        tally, said = self._pending
        for own in said:
            tally.add(*own)

    def line(self) -> dict[str, float]:
        """Returns the means since the last line over all processes, which all must ask."""
        return self._tally.line(partial(sum_numbers, what="summing the parts of the loss"))

    def held_out_line(self) -> dict[str, float]:
        """Returns the means over the held-out batches since it was last asked, over all processes."""
        found = self._held_out.line(partial(sum_numbers, what="summing the parts of the held-out loss"))
        return {f"val_{name}": value for name, value in found.items()}

    def state(self) -> dict[str, float]:
        """Returns the sums of all processes that a checkpoint keeps; all must ask."""
        return sum_numbers(self._tally.state(), "saving a checkpoint")

    def restore(self, state: Mapping[str, float]) -> None:
        """Takes up the sums of a checkpoint, of which one process does; other keys are passed over."""
        self._tally.restore(state)
