"""Weighted means of named numbers between two lines of metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Numbers = Mapping[str, float]


class Tally:
    """Sums since the last line; a name's mean is over the batches that gave it."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, values: Numbers, weight: float) -> None:
        """Adds the numbers of one batch.

        Args:
            values: By name.
            weight: What the batch counts, such as its label tokens.
        """
        for name, value in values.items():
            total, weights = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total + value * weight, weights + weight)

    def line(self, over_all: Callable[[Numbers], Numbers] = dict) -> dict[str, float]:
        """Returns the means by name, and starts anew.

        Args:
            over_all: Sums the sums of several processes.
        """
        whole = Tally()
        whole.restore(over_all(self.state()))
        self._sums = {}
        return {name: total / weights for name, (total, weights) in whole._sums.items() if weights}

    def state(self) -> dict[str, float]:
        """Returns the sums that a checkpoint keeps."""
        parts = {f"sum.{name}": total for name, (total, _) in self._sums.items()}
        return parts | {f"weight.{name}": weights for name, (_, weights) in self._sums.items()}

    def restore(self, state: Numbers) -> None:
        """Takes up the sums of a checkpoint; other keys are passed over."""
        names = [key.removeprefix("sum.") for key in state if key.startswith("sum.")]
        self._sums = {name: (state[f"sum.{name}"], state[f"weight.{name}"]) for name in names}
