"""Models that answer all rows alike: their score is that of one answer, and says nothing of what rows show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mmtune.evaluation.comparison import ScoredRow

_FEWEST_ROWS = 10
_SHARE = 0.95


def alike(rows: Sequence[ScoredRow], texts: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Returns, of every model that gives one answer to nearly all rows, that answer and how often it gives it.

    Nearly all is 95 of 100, of ten rows or more. Where one answer is a reference of as many rows,
    to give it always is no fault, and nothing is returned.

    Args:
        rows: The scored rows.
        texts: Model to its answers, one per row.

    Returns:
        Model to ``answer``, ``rows`` (those that it gave it to) and ``among_references`` (of how many rows
        it is one of the references), answers compared without outer spaces.
    """
    least = _SHARE * len(rows)
    wanted = Counter(text for row in rows for text in {reference.strip() for reference in row.references})
    if len(rows) < _FEWEST_ROWS or (wanted and max(wanted.values()) >= least):
        return {}
    found = {name: Counter(text.strip() for text in given).most_common(1)[0] for name, given in texts.items()}
    return {
        name: {"answer": answer, "rows": count, "among_references": wanted[answer]}
        for name, (answer, count) in found.items()
        if count >= least
    }
