"""Weighted means of named numbers between two lines of metrics."""

from __future__ import annotations

from collections.abc import Mapping


class Tally:
    """Sums since the last line; a name's mean is over the batches that gave it."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, values: Mapping[str, float], weight: float) -> None:
        """Adds the numbers of one batch.

        Args:
            values: By name.
            weight: What the batch counts, such as its label tokens.
        """
        for name, value in values.items():
            total, weights = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total + value * weight, weights + weight)

    def line(self) -> dict[str, float]:
        """Returns the means by name, and starts anew."""
        found = {name: total / weights for name, (total, weights) in self._sums.items() if weights}
        self._sums = {}
        return found

    def state(self) -> dict[str, float]:
        """Returns the sums that a checkpoint keeps."""
        parts = {f"sum.{name}": total for name, (total, _) in self._sums.items()}
        return parts | {f"weight.{name}": weights for name, (_, weights) in self._sums.items()}

    def restore(self, state: Mapping[str, float]) -> None:
        """Takes up the sums of a checkpoint; other keys are passed over."""
        names = [key.removeprefix("sum.") for key in state if key.startswith("sum.")]
        self._sums = {name: (state[f"sum.{name}"], state[f"weight.{name}"]) for name in names}
