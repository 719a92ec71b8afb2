"""Rows whose options hold no right answer, and answers that are no option."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmtune.evaluation import METRICS
from mmtune.evaluation.comparison import ScoredRow
from mmtune.evaluation.text import label_normalise


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


def beside_options(rows: Sequence[ScoredRow], texts: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns a note where most answers in a model's own words to rows with options are none of them, else nothing.

    Args:
        rows: All rows.
        texts: Answers to them, by model; the last model is judged.
    """
    if not texts:
        return []
    who, answers = list(texts.items())[-1]
    judged = [(row, text) for row, text in zip(rows, answers, strict=True) if row.options]
    beside = sum(label_normalise(text) not in map(label_normalise, row.options) for row, text in judged)
    if 2 * beside <= len(judged):
        return []
    return [
        f"{beside:,} of {len(judged):,} answers of {who} to rows with options are none of these;"
        " eval.answer: rank answers by the likeliest option."
    ]
