"""Signals that ask a run to stop: who may hear them, and how a run ends by them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
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


def end_where_deaf(
    answer: Any, asked: Sequence[int], put_off: Sequence[float], end: Callable[[int], None], seconds: float
) -> None:
    """Ends this process where a signal comes that its main thread does not hear.

    Python answers a signal between two of its instructions. A thread that waits in C++ for another process comes to
    none, and where the other one heard the same signal and left, it waits for ever.

    Args:
        answer: What answers signals; what does in its place, such as a loop that saves first, takes its own time.
        asked: Signals that it has heard and stops for.
        put_off: When it heard some that it puts off; it grows for as long as it does.
        end: Ends the process; is given the signal.
        seconds: Until then a signal may still be heard.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # What is forked shares the pipe, and has signals of its own.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

    def watch() -> None:
        while True:
            (number,) = os.read(reading, 1)
            if number in STOPS and signal.getsignal(number) is answer:
                before = len(put_off)
                time.sleep(seconds)
                if not asked and len(put_off) == before and signal.getsignal(number) is answer:
                    end(number)

    threading.Thread(target=watch, daemon=True).start()


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
