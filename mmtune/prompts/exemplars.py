"""Solved rows that are shown before a question: which ones at random, and how they stand.

``Choose`` is the seam: whatever finds exemplars (a draw here, the nearest in ``retrieval``) is asked with a record and
a number, and answers with training records.
"""

from __future__ import annotations

import hashlib
import heapq
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeVar

from mmtune.media.content import own_name
from mmtune.records import Record

Choose = Callable[[Record, int], Sequence[Record]]
"""Record and number to its exemplars, the nearest (or the first drawn) first."""
Shows = Callable[[Record], Set[str]]
"""Record to the names of its media, equal where media are the same."""
Row = TypeVar("Row")
Order = Literal["nearest_last", "nearest_first", "random"]

POOL_ROWS = 512
"""So many rows of a source may become exemplars at random; the pool rests in memory of every process."""
_AGAIN = re.compile(r"~\d+\Z")


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


def media_names(record: Record) -> Set[str]:
    """Returns the names of a record's media as it gives them: paths, or digests of embedded bytes."""
    return {own_name(medium) for medium in record.media}


@dataclass(frozen=True, slots=True)
class RandomExemplars:
    """Draws exemplars by seed and row id.

    Attributes:
        pools: Source of a row to the ``ExemplarPool`` rows that may stand before it; without a pool there are none.
        seed: Of the draw.
        balance: The answers take turns.
        shows: Names of a record's media.
    """

    pools: Mapping[str, tuple[Record, ...]]
    seed: int
    balance: bool = False
    shows: Shows = media_names

    def __call__(self, record: Record, number: int) -> Sequence[Record]:
        """Returns up to ``number`` rows: never the row itself, one of its text, or one that shares a medium."""
        pool = self.pools.get(record.source, ())
        fit = (pool[at] for at in drawn(len(pool), self.seed, record.id) if not same(pool[at], record, self.shows))
        if self.balance:
            return in_turns(list(fit), number, answer_of)
        return list(islice(fit, number))


def drawn(size: int, seed: int, row: str) -> list[int]:
    """Returns the numbers below ``size`` in an order drawn by seed and row id."""
    order = list(range(size))
    random.Random(f"{seed}\0{row}").shuffle(order)
    return order


def in_turns(rows: Sequence[Row], number: int, label: Callable[[Row], str]) -> list[Row]:
    """Returns up to ``number`` rows, the first first, in which no label comes again before every other one came.

    Args:
        rows: In the order of preference.
        number: How many are wanted.
        label: A row's label.
    """
    left, used = list(rows), Counter[str]()
    out: list[Row] = []
    while left and len(out) < number:
        least = min(used[label(row)] for row in left)
        at = next(at for at, row in enumerate(left) if used[label(row)] == least)
        out.append(left.pop(at))
        used[label(out[-1])] += 1
    return out


def answer_of(record: Record) -> str:
    """Returns the answer that an exemplar shows."""
    return record.target or next(iter(record.references), "")


def shown_ranks(order: Order, count: int, salt: str) -> list[int]:
    """Returns, for each place before the question, which exemplar stands there; 0 is the nearest.

    Args:
        order: How they stand.
        count: How many there are.
        salt: Of a random order; the row's.
    """
    ranks = list(range(count))
    if order == "random":
        random.Random(f"order\0{salt}").shuffle(ranks)
    return ranks[::-1] if order == "nearest_last" else ranks


def bare_id(row: str) -> str:
    """Returns a row's id without the mark of a row that a mixture repeats."""
    return _AGAIN.sub("", row)


def same(exemplar: Record, record: Record, shows: Shows = media_names) -> bool:
    """Says whether an exemplar is the row itself (or says the same), or shows one of its media."""
    if exemplar.id == bare_id(record.id) or exemplar.id == record.id:
        return True
    if not record.media and not exemplar.media:
        return (exemplar.text, exemplar.context) == (record.text, record.context)
    return bool(shows(exemplar) & shows(record))
