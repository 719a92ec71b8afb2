"""Numbers and verdicts as a report words them, the same in Markdown and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

LABELS = {
    "vqa_accuracy": "VQA accuracy",
    "exact_match": "Exact match",
    "accuracy": "Accuracy",
    "relaxed_accuracy": "Relaxed accuracy",
    "token_f1": "Token F1",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "macro_f1": "Macro F1",
    "entity_f1": "Entity F1",
    "wer": "Word error rate",
    "cer": "Character error rate",
}
FACET_LABELS = {
    "source": "source",
    "task": "task",
    "template": "template",
    "answer_type": "answer type",
    "question_type": "question type",
}
_LEVEL = 0.05


def label(metric: str) -> str:
    """Returns a metric's name for people."""
    return LABELS.get(metric, metric)


def number(value: float) -> str:
    """Returns a score with two decimals, large ones with thousands separators."""
    return f"{value:,.2f}"


def signed(value: float) -> str:
    """Returns a difference with its sign (a true minus)."""
    return f"{value:+,.2f}".replace("-", "−") if abs(value) >= 0.005 else "0.00"


def p_value(value: float) -> str:
    """Returns a p-value with three decimals, or that it is smaller."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def interval(entry: Mapping[str, float], *, sign: bool = False) -> str:
    """Returns ``low to high`` of an entry."""
    show = signed if sign else number
    return f"{show(entry['low'])} to {show(entry['high'])}"


def verdict(entry: Mapping[str, Any]) -> str:
    """Returns ``better``, ``worse`` or ``unclear`` for tuned against base; empty with one model.

    Better or worse needs both an interval that excludes zero and a paired test below 5 %.
    """
    difference = entry.get("difference")
    if difference is None:
        return ""
    clear = (difference["low"] > 0 or difference["high"] < 0) and difference["p"] < _LEVEL
    if not clear:
        return "unclear"
    return "better" if (difference["value"] > 0) == entry["higher_is_better"] else "worse"


def headline(report: Mapping[str, Any]) -> str:
    """Returns the report's finding in one sentence, from its leading metric."""
    if not report["metrics"]:
        return "No row has a metric; nothing was scored."
    name, entry = next(iter(report["metrics"].items()))
    models = list(entry["models"])
    last = entry["models"][models[-1]]
    rows = f"{entry['n']:,} held-out {'row' if entry['n'] == 1 else 'rows'}"
    ends = [one for one in entry.get("steps", ()) if (one["first"], one["second"]) == (models[0], models[-1])]
    found = entry.get("difference") or next(iter(ends), None)
    if found is None:
        return (
            f"{label(name)} of {_who(models[-1])} is {number(last['value'])}"
            f" (95 % interval {interval(last)}) on {rows}."
        )
    first = entry["models"][models[0]]
    who = "tuning" if models == ["base", "tuned"] else f"{models[-1]!r} against {models[0]!r}"
    change = f"{label(name)} from {number(first['value'])} to {number(last['value'])}"
    sure = (
        f"a difference of {signed(found['value'])} (95 % interval {interval(found, sign=True)},"
        f" p {_p(found['p'])}) on {rows}"
    )
    outcome = verdict({**entry, "difference": {**found, "p": found.get("p_holm", found["p"])}})
    if outcome == "unclear":
        return f"No clear effect: {who} moved {change}, {sure}."
    verb = "raised" if found["value"] > 0 else "lowered"
    return f"{who[0].upper()}{who[1:]} {verb} {change}, {sure}."


def steps(report: Mapping[str, Any]) -> list[str]:
    """Returns one line per paired test of three or more answerers: each against the one before it and the first."""
    lines = []
    for name, entry in report["metrics"].items():
        for one in entry.get("steps", ()):
            sure = f"95 % interval {interval(one, sign=True)}, p {_p(one['p'])}, {p_value(one['p_holm'])} by Holm"
            change = f"{signed(one['value'])} ({sure})"
            lines.append(f"{label(name)}: {one['second']} against {one['first']} {change}.")
    return lines


def _who(answerer: str) -> str:
    """Returns a model, or a model asked in some way, as a sentence names it."""
    return f"{answerer!r}" if ", " in answerer else f"the {answerer} model"


def _p(value: float) -> str:
    text = p_value(value)
    return text if text.startswith("<") else f"= {text}"


def model_name(path: str) -> str:
    """Returns a hub id as it is, of a folder only its name: a report may be shown to others."""
    return PurePath(path).name if PurePath(path).is_absolute() else path


def short_hash(value: str) -> str:
    """Returns the first twelve characters of a hash."""
    return value[:12]


def interval_head(models: Sequence[str]) -> str:
    """Returns what stands over the interval of the last of several answerers, or of the only one."""
    return "95 % interval" if len(models) == 1 else f"95 % interval of {models[-1]}"


def table_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns head and rows of the score table for a terminal, with the sources below the totals."""
    entries = [(label(name), entry) for name, entry in report["metrics"].items()]
    sources = report["groups"].get("source", {})
    if len(sources) > 1:
        entries += [
            (f"  {value} · {label(name)}", entry) for value, found in sources.items() for name, entry in found.items()
        ]
    models = report["run"]["compare"]
    head = ["metric", *models, *(["difference", "p"] if len(models) == 2 else [interval_head(models)]), "rows"]
    rows = []
    for name, entry in entries:
        cells = [name, *(number(found["value"]) for found in entry["models"].values())]
        if found := entry.get("difference"):
            cells += [f"{signed(found['value'])} [{interval(found, sign=True)}]", p_value(found["p"])]
        else:
            cells += [interval(list(entry["models"].values())[-1])]
        rows.append([*cells, f"{entry['n']:,}"])
    if perplexity := report.get("perplexity"):
        given = perplexity["models"]
        cells = ["perplexity", *(number(given[model]["value"]) if model in given else "" for model in models)]
        rows.append([*cells, *[""] * (len(head) - len(cells) - 1), f"{perplexity['n']:,}"])
    return head, rows
