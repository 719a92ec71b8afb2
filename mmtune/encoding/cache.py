"""Values kept in memory up to a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any


class Cache:
    """Values by key; what was not asked for longest goes first.

    Args:
        room_bytes: Most bytes of all values together.
    """

    def __init__(self, room_bytes: int) -> None:
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._most, self._held = room_bytes, 0

    def get(self, key: Hashable) -> Any:
        """Returns the value of a key, or None."""
        found = self._values.get(key)
        if found is None:
            return None
        self._values.move_to_end(key)
        return found[0]

    def put(self, key: Hashable, value: Any, size_bytes: int) -> None:
        """Keeps a value; one that is larger than the whole room is not kept and displaces nothing."""
        if size_bytes > self._most:
            return
        self._held += size_bytes - self._values.pop(key, (None, 0))[1]
        self._values[key] = value, size_bytes
        while self._held > self._most:
            self._held -= self._values.popitem(last=False)[1][1]
