"""The tables that only some reports have: passes of a fusion, and what was taken away; the same cells everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmtune.reports.wording import interval, label, number, p_value, perplexity, perplexity_interval, signed

_ABSENT = {
    "modality": "no row has a medium",
    "fusion": "the model reads a row in one pass",
    "shots": "no row shows exemplars",
    "instructions": "all rows ask the same",
}


@dataclass(frozen=True, slots=True)
class Extra:
    """A table whose first two columns are words and all others numbers."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str


def extra_tables(report: Mapping[str, Any], *, every_metric: bool = True) -> list[Extra]:
    """Returns the tables that a report has something for.

    Args:
        report: The report document.
        every_metric: Pairs of answerers are compared by all metrics, not by the leading one alone.
    """
    compared = list(_pairs(report["metrics"]))
    return [
        *(compared if every_metric else compared[:1]),
        *_passes(report.get("fusion"), report.get("perplexity")),
        *_ablation(report.get("ablation")),
        *_filling(report.get("filling")),
    ]


def _pairs(metrics: Mapping[str, Any]) -> Iterator[Extra]:
    for metric, entry in metrics.items():
        rows = []
        for one in entry.get("steps", ()):
            sure = [interval(one, sign=True), p_value(one["p"]), p_value(one["p_holm"])]
            rows.append([one["second"], one["first"], signed(one["value"]), *sure])
        if rows:
            yield Extra(
                f"{label(metric)}: what differs in one thing",
                ["answers by", "against", "difference", "95 % interval", "p", "p by Holm"],
                rows,
                "Pairs on the same rows that differ in tuning, in the prompt or in the exemplars, and tuning against a"
                " better prompt alone. Holm's p is corrected for the number of lines.",
            )


def _passes(found: Mapping[str, Any] | None, mixed: Mapping[str, Any] | None) -> Iterator[Extra]:
    if not found:
        return
    rows = []
    together = mixed["models"] if mixed else {}
    for model, own in found.items():
        for branch, alone in own["branches"].items():
            weight, losses = alone["weight"], alone["perplexity"]
            cells = [f"{weight['value']:.3f}", f"{weight['low']:.3f} to {weight['high']:.3f}"]
            rows.append(
                [model, branch, *cells, perplexity(losses["value"]), perplexity_interval(losses), f"{alone['n']:,}"]
            )
        if model in together:
            losses = together[model]
            cells = [perplexity(losses["value"]), perplexity_interval(losses), f"{mixed['n']:,}" if mixed else ""]
            rows.append([model, "all, mixed", "", "", *cells])
    even = math.log(max(len(own["branches"]) for own in found.values()))
    entropies = ", ".join(f"{model} {own['gate_entropy']:.2f}" for model, own in found.items())
    yield Extra(
        "Passes of the fusion",
        ["model", "pass", "mean weight", "95 % interval", "perplexity", "95 % interval", "rows"],
        rows,
        "Each pass alone, on the rows that have what it reads (joint: it sees all); the weight is that of the gate. The"
        f" gate's mean entropy in nats (0: one pass has all the weight; {even:.2f}: all have the same): {entropies}.",
    )


def _ablation(found: Mapping[str, Any] | None) -> Iterator[Extra]:
    if not found:
        return
    absent = "; ".join(f"{kind} ({_ABSENT[kind]})" for kind in found["nothing"])
    nothing = f" Of eval.ablate this had nothing to take away: {absent}." if absent else ""
    rows = []
    for entry in found["entries"]:
        for metric, scored in entry["metrics"].items():
            before, after = scored["models"].values()
            change = scored["difference"]
            values = [number(before["value"]), number(after["value"]), signed(change["value"])]
            tail = [interval(change, sign=True), p_value(change["p"]), f"{scored['n']:,}"]
            rows.append([entry["name"], label(metric), *values, *tail])
        if losses := entry.get("perplexity"):
            before, after = losses["models"].values()
            values = [perplexity(before["value"]), perplexity(after["value"]), "", ""]
            tail = [p_value(losses["loss_difference"]["p"]), f"{losses['n']:,}"]
            rows.append([entry["name"], "Perplexity", *values, *tail])
    yield Extra(
        "What the answers rest on",
        ["asked", "metric", found["model"], "then", "difference", "95 % interval", "p", "rows"],
        rows,
        "Each line asks the rows that have what is taken away once more; the difference is to the same model on the"
        " same rows as they are. A modality is hidden by the mask where the model is trained for that, else left out"
        " of the conversation. The commonest answer is that of each source among these rows." + nothing,
    )


def _filling(found: Sequence[Mapping[str, Any]] | None) -> Iterator[Extra]:
    if not found:
        return
    rows = [
        [
            own["missing"],
            own["source"],
            f"{own['error']:.3f}",
            f"{own['recall']:.1%}",
            f"{1 / own['pool']:.1%}",
            f"{own['pool']:,}",
            f"{own['rows']:,}",
        ]
        for own in found
    ]
    yield Extra(
        "Missing parts filled in",
        ["missing", "filled in from", "error", "its own is nearest", "by chance", "distinct", "rows"],
        rows,
        "Codes of a missing medium, made by the generators of the base from the code of another part of the row (text:"
        " question and answer). An error of 1 is that of the codes' mean; the nearest is looked for among the distinct"
        " true codes. A code stands for a whole medium: the language model, which reads tokens, answers without it.",
    )
