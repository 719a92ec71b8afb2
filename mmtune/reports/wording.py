"""Numbers and verdicts as a report words them, the same in Markdown and on the page."""

from __future__ import annotations

import math
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


def named(metric: str) -> str:
    """Returns a metric's name inside a sentence: in small letters, unless it opens with an abbreviation."""
    told = label(metric)
    return told if told[1:2].isupper() else told[:1].lower() + told[1:]


def number(value: float) -> str:
    """Returns a score with two decimals, large ones with thousands separators."""
    return f"{value:,.2f}"


def perplexity(value: float) -> str:
    """Returns a perplexity with three significant digits and thousands separators."""
    if not 0 < value < math.inf:
        return number(value)
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.{max(2 - math.floor(math.log10(rounded)), 0)}f}"


def perplexity_interval(entry: Mapping[str, float]) -> str:
    """Returns ``low to high`` of a perplexity."""
    return f"{perplexity(entry['low'])} to {perplexity(entry['high'])}"


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
    """Returns the report's finding in one sentence, from its leading metric and the pair that it opens with."""
    if not report["metrics"]:
        return "No row has a metric; nothing was scored."
    name, entry = next(iter(report["metrics"].items()))
    kind = "training" if report["run"]["split"] == "train" else "held-out"
    rows = f"{entry['n']:,} {kind} {'row' if entry['n'] == 1 else 'rows'}"
    pair = report["run"]["pair"]
    if pair is None:
        who, last = list(entry["models"].items())[-1]
        alone = f"{label(name)} of {_who(who)} is {number(last['value'])} (95 % interval {interval(last)}) on {rows}."
        return alone + _vote_said(entry) + _alike_said(report, (who,))
    found = leading_test(entry, pair)
    before, after = (number(entry["models"][who]["value"]) for who in pair)
    beside = _vote_said(entry) + _alike_said(report, pair)
    unclear = outcome(report) == "unclear"
    few = unclear and _too_few(entry, found)
    if few and entry["media_groups"] < entry["n"]:
        groups = entry["media_groups"]
        rows += f" that share media in {groups:,} {'group' if groups == 1 else 'groups'}"
    sure = f"{interval(found, sign=True)}, p {_p(found['p'])}) on {rows}"
    change, subject = f"{named(name)} from {before} to {after}", _subject(*pair)
    by = f"a difference of {signed(found['value'])} (95 % interval {sure}"
    if unclear:
        said = "Too few rows to tell" if few else "No clear effect"
        moved = f"moved {change}, {by}"
        if before == after:
            moved = f"left {named(name)} unchanged at {after} (95 % interval of the difference {sure}"
        return f"{said}: {subject} {moved}.{beside}"
    verb = "raised" if found["value"] > 0 else "lowered"
    return f"{subject[0].upper()}{subject[1:]} {verb} {change}, {by}.{beside}"


def _too_few(entry: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Says whether no outcome could pass the test, or the interval excludes 0 where the test does not pass.

    Of n units whose signs are flipped the least two-sided p is 2 / 2^n; Holm multiplies it by the number of pairs.
    """
    least = 2.0 ** (1 - entry["media_groups"]) * max(len(entry.get("steps", ())), 1)
    return least >= _LEVEL or ((found["low"] > 0 or found["high"] < 0) and found["p"] >= _LEVEL)


def _vote_said(entry: Mapping[str, Any]) -> str:
    """Returns what exemplars alone would answer by majority, beside the best model; empty where none are shown."""
    votes = {name: found["value"] for name, found in entry["models"].items() if name.startswith("vote, ")}
    if not votes or not entry["higher_is_better"]:
        return ""
    name, value = max(votes.items(), key=lambda item: item[1])
    best = max(found["value"] for model, found in entry["models"].items() if model not in votes)
    place = "as much as" if value == best else "more than" if value > best else "less than"
    return f" The exemplars' majority alone ({name!r}) scores {number(value)}, {place} the best model ({number(best)})."


def _alike_said(report: Mapping[str, Any], shown: Sequence[str]) -> str:
    """Returns which of the shown models give one answer to nearly all rows; empty where none does."""
    told: dict[tuple[str, int, int], list[str]] = {}
    for name in shown:
        found = report.get("alike", {}).get(name)
        if found:
            told.setdefault((found["answer"], found["rows"], found["among_references"]), []).append(_who(name))
    said = ""
    for (answer, rows, wanted), names in told.items():
        short, who = answer if len(answer) <= 60 else f"{answer[:57]}...", " and ".join(names)
        said += (
            f" {who[:1].upper()}{who[1:]} answer{'s' if len(names) == 1 else ''} {short!r} to {rows:,} of"
            f" {report['n']:,} rows, whatever they show; it is a reference of {wanted:,}."
        )
    return said


def rows_said(report: Mapping[str, Any]) -> str:
    """Returns how many rows were scored, of how many where some were refused, and of what they are a sample."""
    whole, read, count = report["run"]["split_rows"], report["read"], report["n"]
    said = f"{count:,} {'row' if count == 1 else 'rows'}" if count == read else f"{count:,} of {read:,} rows"
    return said + (f", a sample of {whole:,}" if read < whole else "")


def rows_or_trees(rows: Mapping[str, int], examples: Mapping[str, int]) -> str:
    """Returns the rows of every split, as trees of rows where those that share media are one.

    Args:
        rows: Split to the rows of the stage.
        examples: Split to the rows that they hold, where that was counted.
    """
    said = []
    for split, count in rows.items():
        own = examples.get(split, count)
        trees = f"{count:,} {'tree' if count == 1 else 'trees'} of {own:,} {'row' if own == 1 else 'rows'}"
        said.append(f"{split} {count:,}" if own == count else f"{split} {trees}")
    return ", ".join(said)


def answers_said(report: Mapping[str, Any]) -> str:
    """Returns how answers came about: words of the model's own, or options of the row."""
    run = report["run"]
    own = f"greedy, at most {run['max_new_tokens']} new tokens"
    if not run["with_options"]:
        return own
    ways = {
        "rank": "the likeliest option",
        "prototype": "the option of the nearest state",
        "soft": "the option of the likeliest learned vector",
    }
    way = ways[run["answer"]]
    left = report["n"] - run["with_options"]
    return f"{way}; {left:,} rows without options {own}" if left else way


def kind_titles(pair: Sequence[str] | None) -> dict[str, str]:
    """Returns what stands over the shown rows of every kind, see ``samples.KINDS``.

    Args:
        pair: The two answerers that tell the kinds, or None for one alone.
    """
    titles = {"right": "Right", "wrong": "Wrong"}
    if pair is None:
        return titles
    if _subject(*pair).startswith("tuning"):
        return {
            **titles,
            "won": "Better after tuning",
            "lost": "Worse after tuning",
            "missed": "Wrong before and after",
        }
    first, second = pair
    won, lost = f"{second} better than {first}", f"{second} worse than {first}"
    return {**titles, "won": won, "lost": lost, "missed": f"{first} and {second} wrong"}


def outcome(report: Mapping[str, Any]) -> str:
    """Returns the ``verdict`` of what the report opens with, by Holm's p where there are several pairs."""
    pair, entry = report["run"]["pair"], next(iter(report["metrics"].values()), None)
    if pair is None or entry is None:
        return ""
    found = leading_test(entry, pair)
    return verdict({**entry, "difference": {**found, "p": found.get("p_holm", found["p"])}})


def leading_test(entry: Mapping[str, Any], pair: Sequence[str]) -> Mapping[str, Any]:
    """Returns the paired test of the pair that a report opens with."""
    own = (one for one in entry.get("steps", ()) if [one["first"], one["second"]] == list(pair))
    found: Mapping[str, Any] = entry.get("difference") or next(own)
    return found


def _subject(first: str, second: str) -> str:
    (before, _, way), (after, _, other) = first.partition(", "), second.partition(", ")
    if (before, after) == ("base", "tuned") and way == other:
        return f"tuning ({way} exemplars)" if way else "tuning"
    return f"{second!r} against {first!r}"


def is_together(answerer: str) -> bool:
    """Says whether an answerer is an ensemble of others."""
    return answerer.endswith(", ensemble")


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
