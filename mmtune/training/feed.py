"""The batches of one rank, in order, made ahead of the step that needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from mmtune.errors import MmtuneError, ResourceError
from mmtune.signals import ignore_stops

Batch = Mapping[str, torch.Tensor]
Batches = Generator[Batch, None, None]
_AHEAD = 2


def feed(make: Callable[[Any], Batch], chosen: Iterable[Any], workers: int) -> Batches:
    """Yields ``make(item)`` for every item of ``chosen``, in order.

    What is made ahead is no state: a resumed run makes it again. An error in ``make`` is
    raised where its batch would have come.

    Args:
        make: What names a micro batch to the padded batch; touches no random state.
        chosen: What names each micro batch.
        workers: Processes that make batches; 0 makes them in one thread of this process.

    Raises:
        ResourceError: A process that makes batches was killed.
    """
    return _by_processes(make, list(chosen), workers) if workers else _by_thread(make, chosen)


def _by_thread(make: Callable[[Any], Batch], chosen: Iterable[Any]) -> Batches:
    waiting: deque[Future[Batch]] = deque()
    # One OpenMP thread here: a second team of threads would spin on the cores that the step computes on.
    with ThreadPoolExecutor(1, "batches", torch.set_num_threads, (1,)) as pool:
        try:
            for item in chosen:
                waiting.append(pool.submit(make, item))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def worker_errors() -> Iterator[None]:
    """Says wherever a loop hears of it that a process that makes its batches was killed.

    PyTorch raises that from a signal handler: in the next batch, or in the middle of a step.

    Raises:
        ResourceError: One was killed.
    """
    try:
        yield
    except RuntimeError as error:
        if not _was_killed(error):
            raise
        raise _killed_worker() from error


def _was_killed(error: RuntimeError) -> bool:
    return "DataLoader worker" in str(error)


def _killed_worker() -> ResourceError:
    return ResourceError(
        "a process that loads media was killed, most likely for want of memory",
        "lower finetune.workers and run the same command again; it goes on from the last checkpoint",
        "worker_died",
    )


class _MicroBatches(torch.utils.data.Dataset):
    def __init__(self, make: Callable[[Any], Batch], chosen: list[Any]) -> None:
        self._make, self._chosen = make, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Batch | MmtuneError:
        try:
            return self._make(self._chosen[index])
        except MmtuneError as error:
            # Returned, because the loader would make another error of it.
            return error


def _by_processes(make: Callable[[Any], Batch], chosen: list[Any], workers: int) -> Batches:
    loader: Any = torch.utils.data.DataLoader(
        _MicroBatches(make, chosen),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4,
        worker_init_fn=lambda _: ignore_stops(),
        # Its own, so that starting the workers draws nothing from the generator that a step has seeded.
        generator=torch.Generator(),
        # Forked, because open files and memory maps of the split are inherited, not copied.
        multiprocessing_context="fork",
    )
    ready = iter(loader)
    killed = False
    try:
        while (batch := next(ready, None)) is not None:
            if isinstance(batch, MmtuneError):
                raise batch
            yield batch
    except RuntimeError as error:
        if not _was_killed(error):
            raise
        killed = True
    finally:
        # The loader ends its processes when nothing holds it any more; a traceback would hold this frame.
        del ready, loader
    if killed:
        raise _killed_worker()
