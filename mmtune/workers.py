"""Work in several processes: the same results in the same order, however many there are."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, Literal, TypeVar

from mmtune.errors import ResourceError
from mmtune.signals import ignore_stops

Unit = TypeVar("Unit")
Done = TypeVar("Done")
_AHEAD = 2
"""Units in flight per process: one at work, one ready."""


def process_count(asked: int | Literal["auto"]) -> int:
    """Returns how many processes to use; ``auto`` is one per core that this process may use."""
    return len(os.sched_getaffinity(0)) if asked == "auto" else int(asked)


def in_order(
    make: Callable[[], Callable[[Unit], Done]],
    units: Iterable[Unit],
    *,
    processes: int,
    inline: int,
    setting: str,
    preload: Sequence[str] = (),
) -> Iterator[Done]:
    """Yields what became of every unit, in their order and with a few of them in memory.

    Args:
        make: Returns the function that does the work; called once in every process, so it must
            pickle and the function need not.
        units: Read as they are needed, in this process.
        processes: One does everything here.
        inline: So many units are done here first: a small job does not pay for a pool.
        setting: The recipe's key for the number of processes, for the error's hint.
        preload: Modules that every process needs and that are slow to import. They are imported
            once and inherited, unless an earlier pool of this run has started without them.

    Raises:
        ResourceError: A process was killed.
    """
    waiting = iter(units)
    few = waiting if processes == 1 else islice(waiting, inline)
    work: Callable[[Unit], Done] | None = None
    for unit in few:
        work = work or make()
        yield work(unit)
    first = next(waiting, None)
    if first is not None:
        # Not fork: this process may hold threads (Arrow, a progress bar) that a forked child would lose.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", *preload])
        pool = ProcessPoolExecutor(processes, context, _start, (make,))
        yield from _in_pool(pool, chain((first,), waiting), _AHEAD * processes, setting)


def _in_pool(pool: ProcessPoolExecutor, units: Iterable[Unit], ahead: int, setting: str) -> Iterator[Any]:
    flying: deque[Future[Any]] = deque()
    try:
        for unit in units:
            flying.append(pool.submit(_work, unit))
            if len(flying) > ahead:
                yield flying.popleft().result()
        while flying:
            yield flying.popleft().result()
    except BrokenProcessPool as error:
        raise ResourceError(
            "a worker process was killed, most likely for want of memory; nothing was written",
            f"run the same command again with --set {setting}=1",
            "worker_died",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_make: Callable[[], Callable[[Any], Any]] | None = None
_made: Callable[[Any], Any] | None = None


def _start(make: Callable[[], Callable[[Any], Any]]) -> None:
    global _make
    _make = make
    # Ctrl-C and a lost terminal reach the whole group, and the parent alone answers them. SIGTERM
    # stays deadly: by it the pool ends its other processes when one was killed.
    ignore_stops(signal.SIGINT, signal.SIGHUP)
    # A process is one thread of work; threads of libraries would only fight over the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()


def _leave_with(parent: int) -> None:
    """Ends this process when its parent is gone; the queue alone would keep it waiting for ever."""
    from multiprocessing.connection import wait

    wait([parent])
    os._exit(1)


def _work(unit: Any) -> Any:
    global _made
    if _made is None:
        # Not in ``_start``: an error there would look like a killed process.
        assert _make is not None
        _made = _make()
    return _made(unit)
