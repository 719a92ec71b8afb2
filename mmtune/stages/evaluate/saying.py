"""What eval says of the exemplars that it showed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmtune.talk import counted


def said_of_fewer(facts: Sequence[Mapping[str, Any]], rows: int) -> list[str]:
    """Returns a line per way in which some rows show fewer exemplars than it is named for.

    Args:
        facts: Of ``shots.Asked``.
        rows: How many rows are asked.
    """
    return [
        f"{one['name']}: {few:,} of {rows:,} rows have fewer than {counted(one['shots'], 'exemplar')}"
        for one in facts
        if (few := one["rows_with_fewer_found"])
    ]


def notes_of(facts: Sequence[Mapping[str, Any]], rows: int) -> list[str]:
    """Returns what a reader of the report must know of the exemplars.

    Args:
        facts: Of ``shots.Asked``.
        rows: How many rows are asked.
    """
    notes = []
    for one in facts:
        how = "drawn at random"
        if one["method"] == "retrieval":
            how = f"the nearest by {' and '.join(one['by']) or 'all features'}, {one['order'].replace('_', ' ')}"
        more = [f"diversity {one['diversity']:g}"] if one["diversity"] else []
        more += ["answers in turns"] if one["balance"] else []
        listed = ", ".join([how, *more])
        shown = counted(one["shown"], "exemplar")
        said = f"{one['name']}: {shown} before {rows:,} questions out of the training rows, {listed}"
        if one["rows_with_fewer_found"]:
            said += f"; for {one['rows_with_fewer_found']:,} rows the pool has fewer than {one['shots']}"
        if one["dropped"]:
            said += (
                f"; {one['dropped']:,} of {one['rows_with_dropped']:,} rows did not fit tokenize.max_length:"
                " the farthest were left out"
            )
        notes.append(f"{said}.")
    return notes
