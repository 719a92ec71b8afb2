"""Batches of separate rows that say which rows share a medium or their text, and which step they belong to.

Shapes: B rows, K parts (image, audio, behaviour, text).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmtune.encoding.render import EncodedRow
from mmtune.records import READ_BY
from mmtune.training.data import Numbers, RowBatches

PARTS = ("image", "audio", "text", "behaviour")
"""The columns of ``keys``."""


@dataclass(frozen=True)
class PairedBatches:
    """Row numbers to batches with ``keys`` ``(B, K)`` and ``step``.

    Two rows have the same key of a part where they share its medium, or question and answer; a row that lacks it
    has a key of its own.

    Attributes:
        rows: The rows.
        tasks: ``(n,)`` the number of every row's task, for ``tasks`` ``(B,)``; None leaves it out.
    """

    rows: RowBatches
    tasks: np.ndarray | None = None

    def batch(self, units: Numbers, step: int | None = None) -> dict[str, Any]:
        """Returns the padded batch of some rows, as it is at a training step; ``step`` is -1 outside training."""
        encoded = self.rows.encoded(units)
        made = self.rows.collate(encoded, step)
        keys = [[part_key(row, part, number) for part in PARTS] for number, row in enumerate(encoded)]
        ours = {"keys": torch.tensor(keys), "step": torch.tensor(-1 if step is None else step)}
        if self.tasks is not None:
            ours["tasks"] = torch.from_numpy(self.tasks[np.asarray(units)])
        return {**made, **ours}

    def ids(self, units: Numbers) -> list[str]:
        """Returns the example ids of some rows."""
        return self.rows.ids(units)

    def modalities(self, units: Numbers) -> set[str]:
        """Returns the kinds of media in some rows."""
        return self.rows.modalities(units)


def part_key(row: EncodedRow, part: str, number: int) -> int:
    """Returns what two rows have in common where they show the same part, see ``PairedBatches``.

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
