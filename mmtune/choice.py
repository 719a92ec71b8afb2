"""Which rows a limit keeps, whatever their order: those whose ids hash lowest.

A smaller limit keeps a subset of what a larger one keeps. Where one choice follows another, the second must not use
the hash of the first: of a source that ``sources[].limit`` cut, only low hashes are left, and the lowest of them and of
a whole source would nearly all be its. So every purpose has hashes of its own; or sources are taken by their shares.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

Purpose = Literal["source", "eval.limit", "tokenize.limit", "eval_rows"]
"""What a choice is for; ``source`` among the rows of one source, as by ``sources[].limit`` and in a mixture."""


def id_hash(name: str, purpose: Purpose) -> int:
    """Returns a 64-bit hash of an id, independent of that for any other purpose."""
    salt = b"" if purpose == "source" else purpose.encode()
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8, salt=salt).digest())


def chosen(ids: Iterable[str], limit: int, purpose: Purpose) -> list[int]:
    """Returns the numbers of at most ``limit`` ids, ascending."""
    lowest = heapq.nsmallest(limit, ((id_hash(name, purpose), number) for number, name in enumerate(ids)))
    return sorted(number for _, number in lowest)


def in_shares(ids: Sequence[str], sources: Sequence[str]) -> list[int]:
    """Returns the numbers of all rows so that every source has its share of any beginning, to within a row.

    The k-th of the n rows of a source, by the hash for ``source``, stands at ``(k - 1/2) / n``: those of a single
    source stand by that hash alone.

    Args:
        ids: Of the rows.
        sources: Of the rows too.
    """
    hashes = [id_hash(name, "source") for name in ids]
    counts, seen, places = Counter(sources), Counter[str](), [0.0] * len(ids)
    for at in sorted(range(len(ids)), key=lambda at: (hashes[at], at)):
        places[at] = (seen[sources[at]] + 0.5) / counts[sources[at]]
        seen[sources[at]] += 1
    return sorted(range(len(ids)), key=lambda at: (places[at], hashes[at], at))
