"""A polite stop: SIGTERM, SIGINT and SIGHUP ask the loop to save and leave at a step boundary."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from mmtune.signals import hear


class Stopped(Exception):
    """A signal came in the middle of something that leaves nothing behind."""


class StopFlag:
    """Context manager; ``wanted`` names the signal that came. A second SIGINT stops at once."""

    def __init__(self) -> None:
        self.wanted: int = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        self._old = hear(self._ask)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.wanted == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        # The first one says why; a launcher may send another after it.
        self.wanted = self.wanted or number

    def __bool__(self) -> bool:
        return bool(self.wanted)
