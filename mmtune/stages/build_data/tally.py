"""How many rows of each source build-data read, built and refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmtune.errors import DataError
from mmtune.prompts.chunk import Built
from mmtune.recipe import Source

_LOOKED_FOR = "check `images`, `audios` and `videos` of the sources: media paths are relative to them"
_BELOW = (
    "set `images`, `audios` or `videos` of the source to the media's folder and write paths relative to it, or have"
    " `columns.strip` cut off what stands before"
)


@dataclass(slots=True)
class Tally:
    """Counts of one source.

    Attributes:
        source: The source.
        read: Its items.
        rows: Those that became rows.
        tasks: Rows by task.
        asked: Rows by how they are asked, see ``Built``.
    """

    source: Source
    read: int = 0
    rows: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)

    def add(self, built: Built) -> None:
        """Counts the rows of a chunk."""
        self.rows += built.batch.num_rows
        self.tasks.update(built.tasks)
        self.asked.update(built.asked)

    def facts(self) -> dict[str, Any]:
        """Returns what the manifest tells of the source."""
        return {
            "id": self.source.id,
            "split": self.source.split,
            "reader": self.source.reader,
            "read": self.read,
            "rows": self.rows,
            "tasks": dict(self.tasks),
        }


def train_asked(tallies: Iterable[Tally]) -> Counter[str]:
    """Returns how the rows of all training sources are asked."""
    asked: Counter[str] = Counter()
    for tally in tallies:
        if tally.source.split == "train":
            asked.update(tally.asked)
    return asked


def train_rows(tallies: Iterable[Tally]) -> dict[str, int]:
    """Returns the rows of every training source by its id."""
    return {tally.source.id: tally.rows for tally in tallies if tally.source.split == "train"}


def check_drops(tallies: Sequence[Tally], drops: Mapping[str, int], most: float, log: Path) -> None:
    """Refuses a build without rows, or with too many refused ones.

    Args:
        tallies: Of all sources.
        drops: Reason to how many rows were refused.
        most: Largest share of the items that may be refused.
        log: The refused rows, for the first of them.

    Raises:
        DataError: No row is left, or more are refused.
    """
    read, rows = sum(tally.read for tally in tallies), sum(tally.rows for tally in tallies)
    listed = ", ".join(f"{reason} {count:,}" for reason, count in drops.items())
    if not rows:
        raise DataError(
            f"no row is left of {read:,}: {listed or 'the sources gave none'}{first_reject(log, drops)}",
            f"{_mend(drops) or 'mend the data or the paths'}; nothing was written",
            "no_rows",
        )
    if sum(drops.values()) > most * read:
        raise DataError(
            f"{sum(drops.values()):,} of {read:,} rows were refused, more than build.max_drop_fraction "
            f"({most:g}) allows: {listed}{first_reject(log, drops)}",
            f"{_mend(drops) or 'mend the data'}, or raise build.max_drop_fraction; nothing was written",
            "too_many_drops",
        )


def _mend(drops: Mapping[str, int]) -> str:
    """Returns what to do about refused media paths, of absent and outlying ones the commoner; empty where none is."""
    if drops.get("path_escape", 0) > drops.get("media_missing", 0):
        return _BELOW
    return _LOOKED_FOR if "media_missing" in drops else ""


def first_reject(log: Path, drops: Mapping[str, int]) -> str:
    """Returns where the first of the rows stands that were refused for the commonest reason, and what is wrong."""
    common = max(drops, key=lambda reason: drops[reason], default="")
    with open(log, encoding="utf-8") as handle:
        first = next((found for line in handle if (found := json.loads(line))["reason"] == common), None)
    if first is None:
        return ""
    return f"; the first at {first['where'] or first['id']}: {first['detail'][:300]}"
