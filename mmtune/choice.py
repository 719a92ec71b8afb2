"""Which rows a limit keeps: those whose ids hash lowest.

The choice does not depend on the order of the rows, so it is no sample of one source alone, and a
smaller limit keeps a subset of what a larger one keeps.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable


def id_hash(name: str) -> int:
    """Returns a 64-bit hash of an id."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def chosen(ids: Iterable[str], limit: int) -> list[int]:
    """Returns the numbers of at most ``limit`` ids, ascending."""
    lowest = heapq.nsmallest(limit, ((id_hash(name), number) for number, name in enumerate(ids)))
    return sorted(number for _, number in lowest)
