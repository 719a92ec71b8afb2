"""Batches of separate rows that say which rows share a medium or their text.

Shapes: B rows, K parts (image, audio, behaviour, text).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmtune.encoding.render import EncodedRow
from mmtune.records import READ_BY

PARTS = ("image", "audio", "text", "behaviour")
"""The columns of ``keys``."""


@dataclass(frozen=True)
class PairCollator:
    """Rows to batches with ``keys`` ``(B, K)``.

    Two rows have the same key of a part where they share its medium, or question and answer; a row that lacks it
    has a key of its own.

    Attributes:
        collate: Rows and the training step, if there is one, to the batch.
    """

    collate: Callable[[list[EncodedRow], int | None], dict[str, Any]]

    def __call__(self, rows: list[EncodedRow], step: int | None = None) -> dict[str, Any]:
        """Returns the padded batch of some rows, as it is at a training step."""
        keys = [[part_key(row, part, number) for part in PARTS] for number, row in enumerate(rows)]
        return {**self.collate(rows, step), "keys": torch.tensor(keys)}


def part_key(row: EncodedRow, part: str, number: int) -> int:
    """Returns what two rows have in common where they show the same part, see ``PairCollator``.

    Args:
        row: A row.
        part: One of ``PARTS``.
        number: Of the row, for a part that it lacks.
    """
    if part == "text":
        words = np.ones(row.input_ids.size, dtype=bool)
        for span in row.media:
            words[span.start : span.start + span.length] = False
        content = row.input_ids[words].tobytes()
    else:
        own = [span for span in row.media if READ_BY[span.medium.modality] == part]
        if not own:
            return -1 - number
        named = [(span.medium.path, span.frame, span.frames, span.medium.data) for span in own]
        content = repr(named).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
