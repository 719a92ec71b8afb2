"""Model calls of a search: a call is one prompt scored on one row."""

from __future__ import annotations


class Exhausted(Exception):
    """The next score would cost more calls than are left; none was spent."""


class Budget:
    """Counts model calls.

    Attributes:
        total: Calls that may be spent.
        spent: Calls that were.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.spent = 0

    @property
    def left(self) -> int:
        """Calls that are left."""
        return self.total - self.spent

    def spend(self, calls: int) -> None:
        """Counts calls that are about to be made.

        Raises:
            Exhausted: There are fewer left; nothing is counted.
        """
        if calls > self.left:
            raise Exhausted(f"{calls} calls asked for, {self.left} of {self.total} left")
        self.spent += calls
