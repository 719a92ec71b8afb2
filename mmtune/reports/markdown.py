"""The report as Markdown: the same numbers as the page, readable on a forge and in a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmtune.reports.extras import extra_tables
from mmtune.reports.tables import group_lines, is_turned, left_out, turned_head, turned_lines
from mmtune.reports.wording import (
    FACET_LABELS,
    answers_said,
    headline,
    interval,
    interval_head,
    label,
    model_name,
    number,
    p_value,
    perplexity,
    perplexity_interval,
    rows_or_trees,
    rows_said,
    short_hash,
    signed,
    verdict,
)

_SPECIAL = re.compile(r"([\\`*_\[\]<>|])")
_MOST_VALUES = 20


def escape(text: str) -> str:
    """Returns text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Returns a Markdown table; cells are already escaped."""
    marks = ["---:" if column in right else "---" for column in range(len(head))]
    lines = [head, marks, *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write_markdown(report: Mapping[str, Any]) -> str:
    """Returns the report document for a comparison."""
    run = report["run"]
    parts = [
        f"# {escape(run['title'])}",
        f"**{escape(headline(report))}**",
        _facts(report),
        "## Scores",
        _scores(report),
        *_perplexity(report),
        *_groups(report),
        *_extras(report),
        *_training(report),
        "## Made from",
        table(
            ("stage", "hash", "rows", "refused"),
            (
                (
                    item["stage"],
                    f"`{short_hash(item['hash'])}`",
                    rows_or_trees(item["rows"], item.get("examples", {})),
                    ", ".join(f"{reason} {count:,}" for reason, count in item["drops"].items()) or "none",
                )
                for item in report["manifests"]
            ),
        ),
        *(f"- {escape(note)}" for note in report["notes"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(report: Mapping[str, Any]) -> str:
    run = report["run"]
    rejected = ", ".join(f"{reason} {count:,}" for reason, count in report["rejected"].items()) or "none"
    lines = [
        f"- model: `{model_name(run['model'])}`",
        f"- split: {run['split']}, {rows_said(report)}; refused: {rejected}",
        f"- answers: {answers_said(report)}",
        f"- {run['bootstrap']:,} bootstrap samples, seed {run['seed']}",
    ]
    return "\n".join(lines)


def _scores(report: Mapping[str, Any]) -> str:
    if not report["metrics"]:
        return "No row has a metric."
    return _table("metric", [(label(name), entry) for name, entry in report["metrics"].items()])


def _table(what: str, entries: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    if is_turned(list(entries[0][1]["models"])):
        lines = (map(escape, line) for name, entry in entries for line in turned_lines(name, entry))
        return table(turned_head(what), (list(line) for line in lines), right=range(2, 5))
    return table(_head(what, entries[0][1]), (_row(name, entry) for name, entry in entries), right=range(1, 9))


def _head(what: str, entry: Mapping[str, Any]) -> list[str]:
    head = [what, *entry["models"]]
    if "difference" in entry:
        head += ["difference", "95 % interval", "p", "won / lost"]
    else:
        head += [interval_head(list(entry["models"]))]
    return [*head, "n"]


def _row(name: str, entry: Mapping[str, Any]) -> list[str]:
    cells = [escape(name), *(number(found["value"]) for found in entry["models"].values())]
    if found := entry.get("difference"):
        mark = {"better": "**", "worse": "**"}.get(verdict(entry), "")
        cells += [
            f"{mark}{signed(found['value'])}{mark}",
            interval(found, sign=True),
            p_value(found["p"]),
            f"{found['wins']} / {found['losses']}",
        ]
    else:
        cells += [interval(list(entry["models"].values())[-1])]
    return [*cells, f"{entry['n']:,}"]


def _perplexity(report: Mapping[str, Any]) -> list[str]:
    found = report.get("perplexity")
    if not found:
        return []
    rows = [(model, perplexity(value["value"]), perplexity_interval(value)) for model, value in found["models"].items()]
    return [
        "## Perplexity of the reference answers",
        table(("model", "perplexity", "95 % interval"), rows, right=(1, 2)),
        f"Over {found['tokens']:,} answer tokens.",
    ]


def _groups(report: Mapping[str, Any]) -> list[str]:
    parts = []
    for facet, values in report["groups"].items():
        rows, few = group_lines(values)
        if not rows:
            continue
        shown = [(f"{value} · {label(name)}", entry) for value, name, entry in rows[:_MOST_VALUES]]
        parts.append(f"## By {FACET_LABELS.get(facet, facet)}")
        parts.append(_table(FACET_LABELS.get(facet, facet), shown))
        if left := left_out(len(rows) - _MOST_VALUES, few):
            parts.append(f"{left} in `metrics.json`.")
    return parts


def _extras(report: Mapping[str, Any]) -> list[str]:
    parts = []
    for extra in extra_tables(report):
        cells = ([escape(cell) for cell in row] for row in extra.rows)
        parts += [f"## {extra.title}", table(extra.head, cells, right=range(2, len(extra.head))), extra.note]
    return parts


def _training(report: Mapping[str, Any]) -> list[str]:
    facts = report.get("training")
    if not facts:
        return []
    return ["## Training", "\n".join(f"- {escape(str(key))}: {escape(str(value))}" for key, value in facts.items())]
