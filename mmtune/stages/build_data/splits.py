"""The splits of ``instructions/`` while build-data writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmtune.prompts.chunk import Built
from mmtune.prompts.overlap import SplitOverlap
from mmtune.prompts.schema import instructions_schema
from mmtune.storage import SplitWriter, finish_split

_NAMES = ("train", "val", "test")


class Splits:
    """Splits that stand once a row of theirs has come, and what is counted over all of them.

    Args:
        folder: Where they stand, one folder each.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._schema = folder, instructions_schema()
        self._writers: dict[str, SplitWriter] = {}
        self._overlap, self._odd = SplitOverlap(), 0

    def add(self, built: Built) -> None:
        """Writes the rows of a chunk."""
        self._odd += built.odd
        if not built.batch.num_rows:
            return
        if built.split not in self._writers:
            path = self._folder / built.split / "shard-00000.arrow"
            self._writers[built.split] = SplitWriter(path, self._schema)
        self._writers[built.split].write_batch(built.batch)
        self._overlap.add(built.split, built.keys)

    def close(self) -> dict[str, int]:
        """Returns the rows of each split after closing its file."""
        return {name: self._writers[name].close() for name in _NAMES if name in self._writers}

    def finish(self) -> None:
        """Makes every split a folder that ``datasets`` opens."""
        for name in self._writers:
            finish_split(self._folder / name, self._schema)

    def facts(self) -> dict[str, Any]:
        """Returns what the manifest tells of them: distinct media, what splits share, and odd characters."""
        return {
            "distinct_media": self._overlap.distinct_media(),
            "leakage": self._overlap.counts(),
            "odd_characters": self._odd,
        }
