"""Signals that ask a run to stop: who may hear them, and how a run ends by them."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""A scheduler's word, a person's Ctrl-C, and that of a terminal or connection that is gone."""


def hear(answer: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Lets a function answer the signals that ask to stop; returns what answered them before.

    A signal that this process was started to ignore, as ``nohup`` does with SIGHUP, stays ignored.
    """
    heard = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, answer) for number in heard}


def ignore_stops(*others: int) -> None:
    """Lets this process outlive signals meant for its parent, who ends it.

    Args:
        others: Which; all that ask to stop when left out.
    """
    for number in others or STOPS:
        signal.signal(number, signal.SIG_IGN)


def exit_code_of(asked: int) -> int:
    """Returns the exit code of a run that a signal stopped: 130 for Ctrl-C, 75 for those that will start it again."""
    return 130 if asked == signal.SIGINT else 75
