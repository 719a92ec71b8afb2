"""The items of a source that a limit keeps, in two readings; see ``choice``."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator

from mmtune.choice import id_hash
from mmtune.records import Medium, Record, Reject, items_of


def item_hash(item: Record | Reject) -> int:
    """Returns a 64-bit hash of a record's id, or of where a reject stands."""
    return id_hash(item.id if isinstance(item, Record) else f"{item.where}\0{item.reason}", "source")


def take(read: Callable[[], Iterator[Record | Reject]], limit: int | None) -> Iterator[Record | Reject]:
    """Yields at most ``limit`` items in the order of the file; a smaller limit gives a subset.

    The source is read twice, so that only ``limit`` hashes are in memory.
    """
    if limit is None:
        yield from read()
        return
    lowest: list[int] = []
    for item in read():
        value = -item_hash(item)
        if len(lowest) < limit:
            heapq.heappush(lowest, value)
        elif value > lowest[0]:
            heapq.heapreplace(lowest, value)
    bound = -lowest[0] if lowest else -1
    left = limit
    for item in read():
        if left and item_hash(item) <= bound:
            left -= 1
            yield item


def part(items: Iterable[Record | Reject], low: float, high: float) -> Iterator[Record | Reject]:
    """Yields the items whose hash lies in a part of 0 to 1, ``high`` itself outside.

    Records of the same media, or else of the same context, stay together; others go by where they
    stand, so that a file that is read for two splits falls into the same parts.
    """
    for item in items:
        if low <= _unit(item) < high:
            yield item


def _unit(item: Record | Reject) -> float:
    if isinstance(item, Reject):
        return (id_hash(item.where, "source") >> 11) / 2**53
    shown = item.media or tuple(medium for message in item.messages for medium in message.media)
    names = "\0".join(medium.path or "\1".join(items_of(medium)) for medium in shown if _named(medium))
    return (id_hash(names or item.context or item.where, "source") >> 11) / 2**53


def _named(medium: Medium) -> bool:
    """Says whether a medium is known without its bytes being read: by its path, or as a history."""
    return bool(medium.path) or medium.modality == "behaviour"


def cut(items: Iterable[Record | Reject], size: int) -> Iterator[list[Record | Reject]]:
    """Yields the items in parts of one size, the last one shorter."""
    part: list[Record | Reject] = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
