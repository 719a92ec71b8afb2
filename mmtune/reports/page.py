"""The report as one HTML file that needs nothing else: no script, no font, no request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, StrictUndefined

from mmtune.reports import wording
from mmtune.reports.extras import extra_tables
from mmtune.reports.page_source import PAGE, STYLE
from mmtune.reports.plots import interval_plot, loss_plot, marks_of
from mmtune.reports.samples import KINDS, Sample
from mmtune.reports.tables import group_lines, is_turned, left_out, turned_head, turned_lines

_MOST_VALUES = 16
_MOST_OPEN = 8
"""Lines of a group table above which it is folded."""


def write_page(
    report: Mapping[str, Any], samples: Sequence[Sample] = (), loss_rows: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Returns the page of a comparison.

    Every text is escaped, and the page's policy forbids scripts and requests, so that text from a
    data set or a model can do nothing here.

    Args:
        report: The report document, as in ``metrics.json``.
        samples: Rows to show.
        loss_rows: Lines of the adapter's ``metrics.jsonl``.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        number=wording.number,
        signed=wording.signed,
        p=wording.p_value,
        span=wording.interval,
        perplexity=wording.perplexity,
        perplexity_span=wording.perplexity_interval,
        interval_head=wording.interval_head,
        label=wording.label,
        verdict=wording.verdict,
        brief=wording.short_hash,
        model=wording.model_name,
        rows_or_trees=wording.rows_or_trees,
        turned_parts=_turned_parts,
    )
    environment.tests["turned"] = is_turned
    leading = next(iter(report["metrics"].values()), None)
    titles = wording.kind_titles(report["run"]["pair"])
    shown = {kind: [sample for sample in samples if sample.kind == kind] for kind in KINDS}
    return environment.from_string(PAGE).render(
        style=STYLE,
        report=report,
        run=report["run"],
        headline=wording.headline(report),
        outcome=wording.outcome(report),
        leading=leading,
        facets=_facets(report),
        kinds={titles[kind]: rows for kind, rows in shown.items() if rows},
        rows_said=wording.rows_said(report),
        answers_said=wording.answers_said(report),
        extras=extra_tables(report),
        loss=loss_plot(loss_rows),
        validated=any("val_loss" in row for row in loss_rows),
        dots=_dots,
        turned_head=turned_head,
        marks=marks_of(list(leading["models"])) if leading else {},
    )


def _dots(models: Mapping[str, Mapping[str, float]], entries: Sequence[Mapping[str, Any]]) -> str:
    """Returns the interval plot of a row, on the axis that all rows of its table share."""
    highest = max(found["high"] for entry in entries for found in entry["models"].values())
    return interval_plot(models, max(100.0, highest))


def _turned_parts(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the lines of an entry with a line per answerer: its cells, whom its plot shows, and how it looks."""
    out: list[dict[str, Any]] = []
    last = None
    for (answerer, found), (_, *cells) in zip(entry["models"].items(), turned_lines("", entry), strict=True):
        model = answerer.partition(", ")[0]
        place = "entry" if last is None else "" if model == last else "other-model"
        style = f"{place} together" if wording.is_together(answerer) else place
        out.append({"cells": cells, "models": {answerer: found}, "style": style.strip()})
        last = model
    return out


def _facets(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the group tables that say more than the table of all rows."""
    out = []
    for facet, values in report["groups"].items():
        lines, few = group_lines(values)
        if not lines:
            continue
        rows = [{"value": value, "metric": metric, "entry": entry} for value, metric, entry in lines]
        answerers = list(lines[0][2]["models"])
        out.append(
            {
                "label": wording.FACET_LABELS.get(facet, facet),
                "rows": rows[:_MOST_VALUES],
                "open": len(rows) * (len(answerers) if is_turned(answerers) else 1) <= _MOST_OPEN,
                "entries": [row["entry"] for row in rows[:_MOST_VALUES]],
                "more": left_out(len(rows) - _MOST_VALUES, few),
                "several": len({row["metric"] for row in rows}) > 1,
            }
        )
    return out
