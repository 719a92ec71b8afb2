"""Solved rows that are shown before a question: which ones, at random.

``Choose`` is the seam: whatever finds exemplars (a draw here, a search index elsewhere) is asked
with a record and a number, and answers with training records of the same source.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mmtune.records import Medium, Record

Choose = Callable[[Record, int], Sequence[Record]]
"""Record and number to its exemplars, the first shown first."""

POOL_ROWS = 512
"""So many rows of a source may become exemplars; the pool rests in memory of every process."""


class ExemplarPool:
    """The rows of one source that may be shown: those whose ids hash lowest with the seed.

    Args:
        seed: Of the choice.
        size: Most rows.
    """

    def __init__(self, seed: int, size: int = POOL_ROWS) -> None:
        self._seed, self._size = seed, size
        self._kept: list[tuple[int, int, Record]] = []
        self._seen = 0

    def see(self, record: Record) -> None:
        """Considers a training row; one without an answer, and a conversation, is no exemplar."""
        if record.messages or not (record.target or record.references):
            return
        digest = hashlib.blake2b(f"{self._seed}\0{record.id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self._seen += 1
        entry = (-int.from_bytes(digest, "big"), self._seen, record)
        if len(self._kept) < self._size:
            heapq.heappush(self._kept, entry)
        elif entry > self._kept[0]:
            heapq.heapreplace(self._kept, entry)

    def rows(self) -> tuple[Record, ...]:
        """Returns the rows of the pool, in an order that does not depend on the file's."""
        return tuple(record for *_, record in sorted(self._kept, key=lambda entry: -entry[0]))


@dataclass(frozen=True, slots=True)
class RandomExemplars:
    """Draws exemplars from the row's own source, by seed and row id.

    Attributes:
        pools: Source to its ``ExemplarPool`` rows; a source without a pool has no exemplars.
    """

    pools: Mapping[str, tuple[Record, ...]]
    seed: int

    def __call__(self, record: Record, number: int) -> Sequence[Record]:
        """Returns up to ``number`` rows: never the row itself, one of its text, or one that shares a medium."""
        pool = self.pools.get(record.source, ())
        order = list(range(len(pool)))
        random.Random(f"{self.seed}\0{record.id}").shuffle(order)
        chosen: list[Record] = []
        for at in order:
            if len(chosen) == number:
                break
            if not same(pool[at], record):
                chosen.append(pool[at])
        return chosen


def same(exemplar: Record, record: Record) -> bool:
    """Says whether an exemplar is the row itself (or says the same), or shows one of its media."""
    if exemplar.id == record.id:
        return True
    if not record.media and not exemplar.media:
        return (exemplar.text, exemplar.context) == (record.text, record.context)
    return bool(_media(exemplar) & _media(record))


def _media(record: Record) -> set[str]:
    return {_key(medium) for medium in record.media}


def _key(medium: Medium) -> str:
    return medium.path if medium.data is None else hashlib.sha256(medium.data).hexdigest()
