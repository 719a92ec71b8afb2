"""Rows whose options hold no right answer: answered by an option, they are wrong whatever the model knows."""

from __future__ import annotations

from collections.abc import Sequence

from mmtune.evaluation import METRICS
from mmtune.evaluation.comparison import ScoredRow


def out_of_reach(rows: Sequence[ScoredRow]) -> list[str]:
    """Returns a note where some rows have options of which none scores by the row's leading metric, else nothing.

    Rows are judged by metrics of a single answer (``evaluation.METRICS``); those led by others are passed over.

    Args:
        rows: All rows that are answered by their options where they have some.
    """
    judged = [row for row in rows if row.options and row.references and row.metrics and row.metrics[0] in METRICS]
    lost = [
        row
        for row in judged
        if not any(METRICS[row.metrics[0]](option, row.references, row.options) for option in row.options)
    ]
    if not lost:
        return []
    first = lost[0]
    return [
        f"{len(lost):,} of {len(judged):,} rows with options hold no right answer among them and score 0 in any case,"
        f" the first {first.id} (reference {first.references[0]!r})."
    ]
