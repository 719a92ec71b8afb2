"""The tables of scores, as cells: one column per answerer where that fits, else one line for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmtune.reports.wording import (
    interval,
    interval_head,
    label,
    number,
    p_value,
    perplexity,
    perplexity_interval,
    signed,
)

_FEWEST = 5
"""Rows below which a group says nothing of its own."""
_WIDEST = 72
"""Most characters of the columns of all answerers and their interval; more are broken on a terminal."""


def is_turned(models: Sequence[str]) -> bool:
    """Says whether answerers stand below each other: more than two whose names do not fit side by side."""
    return len(models) > 2 and sum(len(name) + 3 for name in [*models, interval_head(models)]) > _WIDEST


def turned_head(what: str) -> list[str]:
    """Returns the head of a table with a line per answerer; the first two columns are words."""
    return [what, "answers by", "score", "95 % interval", "rows"]


def turned_lines(name: str, entry: Mapping[str, Any]) -> list[list[str]]:
    """Returns the lines of an entry; only the first of them has its name."""
    return [
        ["" if at else name, model, number(found["value"]), interval(found), f"{entry['n']:,}"]
        for at, (model, found) in enumerate(entry["models"].items())
    ]


def group_lines(values: Mapping[str, Mapping[str, Any]]) -> tuple[list[tuple[str, str, Mapping[str, Any]]], int]:
    """Returns the lines of a facet that say more than all rows together, and how many have too few rows for that.

    Args:
        values: Value of the facet to its metrics.

    Returns:
        Value, metric and entry of every line, none where there is one value alone; the number of those left out.
    """
    if len(values) < 2:
        return [], 0
    lines = [(value, metric, entry) for value, found in values.items() for metric, entry in found.items()]
    shown = [line for line in lines if line[2]["n"] >= _FEWEST]
    return shown, len(lines) - len(shown)


def left_out(more: int, few: int) -> str:
    """Returns what a table of groups does not show; empty for nothing.

    Args:
        more: Lines beyond those that it has room for, if above 0.
        few: Lines of too few rows.
    """
    said = [f"{more:,} more"] if more > 0 else []
    return " and ".join(
        said + ([f"{few:,} {'line' if few == 1 else 'lines'} of fewer than {_FEWEST} rows"] if few else [])
    )


def table_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns head and rows of the score table for a terminal, with the sources below the totals."""
    entries = [(label(name), entry) for name, entry in report["metrics"].items()]
    sources = report["groups"].get("source", {})
    if len(sources) > 1:
        entries += [
            (f"  {value} · {label(name)}", entry) for value, found in sources.items() for name, entry in found.items()
        ]
    models = report["run"]["compare"]
    if is_turned(models):
        return turned_head("metric"), [line for name, entry in entries for line in turned_lines(name, entry)]
    compared = any("difference" in entry for _, entry in entries)
    head = ["metric", *models, *(["difference", "p"] if compared else [interval_head(models)]), "rows"]
    rows = []
    for name, entry in entries:
        cells = [name, *(number(found["value"]) for found in entry["models"].values())]
        if found := entry.get("difference"):
            cells += [f"{signed(found['value'])} [{interval(found, sign=True)}]", p_value(found["p"])]
        else:
            cells += [interval(list(entry["models"].values())[-1])]
        rows.append([*cells, f"{entry['n']:,}"])
    return head, rows


def perplexity_rows(losses: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns head and rows of the table of perplexities for a terminal."""
    found = losses["models"].items()
    rows = [[model, perplexity(one["value"]), perplexity_interval(one), f"{losses['n']:,}"] for model, one in found]
    return ["answers by", "perplexity", "95 % interval", "rows"], rows
