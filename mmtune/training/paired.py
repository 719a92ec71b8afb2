"""Batches of separate rows that say which rows share a medium or their text, and whose parts belong together.

Shapes: B rows, K parts (image, audio, behaviour, text).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmtune.encoding.render import EncodedRow
from mmtune.errors import RecipeError
from mmtune.records import READ_BY
from mmtune.training.batching import Batches, WithColumns
from mmtune.training.tasks import by_id

if TYPE_CHECKING:
    import pyarrow as pa

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


@dataclass(frozen=True)
class Together:
    """The rows whose parts belong together, so that codes are learned from them.

    Attributes:
        examples: Their ids; None for all rows.
    """

    examples: frozenset[str] | None

    def told(self, batches: Batches) -> Batches:
        """Returns the batches with bool ``together`` ``(B,)``; as they are where all rows belong together."""
        return batches if self.examples is None else WithColumns(batches, partial(_together_column, self, batches))

    def of_trees(self, ids: Sequence[Sequence[str]]) -> np.ndarray:
        """Returns bool ``(trees,)``: which have such a row.

        Args:
            ids: Example ids of every tree.
        """
        return np.array([self.examples is None or any(one in self.examples for one in own) for own in ids], dtype=bool)


def _together_column(together: Together, batches: Batches, units: Any, step: int | None) -> dict[str, torch.Tensor]:
    assert together.examples is not None
    return {"together": torch.tensor([one in together.examples for one in batches.ids(units)])}


def together_of(tables: Iterable[pa.Table], sources: Sequence[str]) -> Together:
    """Returns the rows of some sources.

    Args:
        tables: Splits of instructions/, with ``id`` and ``source``.
        sources: Their ids; empty for all.

    Raises:
        RecipeError: A source has no row.
    """
    if not sources:
        return Together(None)
    source_of = by_id(tables, "source")
    there = sorted(set(source_of.values()))
    strange = sorted(set(sources) - set(there))
    if strange:
        raise RecipeError(
            f"pretrain.codes.sources names {strange[0]}, of which there is no row",
            f"there are: {', '.join(there)}",
            "no_such_source",
        )
    return Together(frozenset(one for one, source in source_of.items() if source in sources))


def belonging_together(present_BK: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns ``(B, K)`` which parts teach codes: those that rows have, of rows whose parts belong together.

    Args:
        present_BK: What each row has.
        batch: With ``together`` ``(B,)`` where that is not so of all rows.
    """
    return present_BK & batch["together"][:, None] if "together" in batch else present_BK
