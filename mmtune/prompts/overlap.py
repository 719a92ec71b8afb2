"""Rows of one split that another split has too, counted in 64-bit hashes: eight bytes a row."""

from __future__ import annotations

import hashlib
from itertools import combinations
from typing import Any

import numpy as np

from mmtune.records import Example, Medium, Record


def hash64(text: str) -> int:
    """Returns a 64-bit hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def example_keys(example: Example, record: Record | None = None) -> tuple[int, int]:
    """Returns the hash of an example's media (0 for none) and of its media with its questions.

    Args:
        example: The example.
        record: What it was made of, whose wording and exemplars say nothing of what it asks; a conversation is taken
            as it stands.
    """
    shown = example.media
    asked = "\0".join(message.text.strip() for message in example.messages if message.role == "user")
    if record is not None and not record.messages:
        # Exemplars stand before the row's own media.
        shown = shown[len(shown) - len(record.media) :]
        own = (record.text.strip(), record.context.strip())
        asked = "\0".join(own) if any(own) else asked
    media = "\0".join(_identity(medium) for medium in shown)
    return (hash64(media) or 1) if media else 0, hash64(f"{media}\0\0{asked}")


def _identity(medium: Medium) -> str:
    if medium.sha256:
        return medium.sha256
    return hashlib.sha256(medium.data).hexdigest() if medium.data is not None else medium.path


class SplitOverlap:
    """Counts the media and the questions that two splits share."""

    def __init__(self) -> None:
        self._media: dict[str, list[Any]] = {}
        self._rows: dict[str, list[Any]] = {}

    def add(self, split: str, keys: Any) -> None:
        """Adds the ``example_keys`` of rows, an array of shape (rows, 2)."""
        self._media.setdefault(split, []).append(np.unique(keys[:, 0][keys[:, 0] > 0]))
        self._rows.setdefault(split, []).append(np.unique(keys[:, 1]))
        for kept in (self._media[split], self._rows[split]):
            if len(kept) > 256:
                kept[:] = [np.unique(np.concatenate(kept))]

    def counts(self) -> dict[str, dict[str, int]]:
        """Returns ``{"train/val": {"media": n, "questions": m}}`` for splits that share something.

        ``media`` counts distinct sets of media shown in both, ``questions`` the same question on
        the same media.
        """
        found = {}
        for first, second in combinations(sorted(self._rows), 2):
            shared = {
                "media": _shared(self._media[first], self._media[second]),
                "questions": _shared(self._rows[first], self._rows[second]),
            }
            if any(shared.values()):
                found[f"{first}/{second}"] = shared
        return found

    def distinct_media(self) -> int:
        """Returns how many distinct sets of media all splits show."""
        everything = [array for kept in self._media.values() for array in kept]
        return len(np.unique(np.concatenate(everything))) if everything else 0


def _shared(first: list[Any], second: list[Any]) -> int:
    return len(np.intersect1d(np.concatenate(first), np.concatenate(second))) if first and second else 0
