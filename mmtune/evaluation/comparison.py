"""Base against tuned: every metric, over all rows and by group, with intervals and paired tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from mmtune.errors import RecipeError
from mmtune.evaluation import BY_CLASS, ERROR_RATES, NORMALISERS, Measured, check_metric, measure
from mmtune.evaluation.intervals import Interval, bootstrap, holm, paired_difference
from mmtune.evaluation.pairs import Pair
from mmtune.records import Prediction

FACETS = ("source", "task", "template", "answer_type", "question_type")
"""What scores are grouped by; the last two are metadata that some data carry."""


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """What scoring needs of one example.

    Attributes:
        metrics: Names of the metrics that apply, the leading one first.
        group: Equal for rows that show the same media.
        template: Name of its wording, or empty.
    """

    id: str
    source: str
    task: str
    group: str
    metrics: tuple[str, ...]
    references: tuple[str, ...]
    options: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    template: str = ""

    def facet(self, name: str) -> str:
        """Returns the row's value of a facet, or an empty string."""
        own = {"source": self.source, "task": self.task, "template": self.template}
        return own.get(name) or self.metadata.get(name, "")


@dataclass(frozen=True, slots=True)
class AnsweredRow:
    """A row with every model's answer, and its scores by metric."""

    row: ScoredRow
    answers: Mapping[str, str]
    scores: Mapping[str, Mapping[str, float]]

    @property
    def leading_metric(self) -> str:
        """The first metric of the row, or an empty string."""
        return self.row.metrics[0] if self.row.metrics else ""

    def predictions(self, asked: Mapping[str, str]) -> list[Prediction]:
        """Returns one Prediction per model.

        Args:
            asked: Model to the question as it was asked.
        """
        row = self.row
        return [
            Prediction(
                id=row.id,
                model=model,
                task=row.task,
                metric=self.leading_metric or "none",
                prompt=asked[model],
                prediction=text,
                references=row.references,
                options=row.options,
                metadata=row.metadata,
            )
            for model, text in self.answers.items()
        ]


@dataclass(frozen=True)
class Comparison:
    """The scores of one or two models over the same rows.

    Attributes:
        metrics: Metric name to its entry: n, models, difference.
        groups: Facet to value to metric name to entry.
        per_row: Model to one mapping of metric name to value per row.
    """

    metrics: dict[str, Any]
    groups: dict[str, dict[str, dict[str, Any]]]
    per_row: dict[str, list[dict[str, float]]]


def compare(
    rows: Sequence[ScoredRow],
    texts: Mapping[str, Sequence[str]],
    *,
    pairs: Sequence[Pair] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Returns all scores of the models' answers.

    Args:
        rows: The examples, in the order of the answers.
        texts: Model name to its answers.
        pairs: Names of models, the second compared with the first; left out: of two models the second with the first.
        resamples: Bootstrap samples.
        seed: Of the bootstrap.
    """
    if pairs is None:
        first, *others = texts
        pairs = [(first, others[0])] if len(others) == 1 else []
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    per_row: dict[str, list[dict[str, float]]] = {model: [{} for _ in rows] for model in texts}
    metrics: dict[str, Any] = {}
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for name in names:
        index = [at for at, row in enumerate(rows) if name in row.metrics and row.references]
        if not index:
            continue
        measured = {model: _measure(name, rows, answers, index) for model, answers in texts.items()}
        for model, found in measured.items():
            for at, value, weight in zip(index, found.values, found.weights, strict=True):
                per_row[model][at][name] = round(float(value / weight) if weight else 0.0, 4)
        media = [rows[at].group for at in index]
        metrics[name] = _entry(measured, pairs, media, np.arange(len(index)), resamples, seed)
        for facet in FACETS:
            for value, chosen in _places(rows, index, facet).items():
                part, own, places = measured, media, chosen
                if name in BY_CLASS:
                    inside = [index[place] for place in chosen]
                    part = {model: _measure(name, rows, answers, inside) for model, answers in texts.items()}
                    own, places = [media[place] for place in chosen], np.arange(len(chosen))
                entry = _entry(part, pairs, own, places, resamples, seed)
                groups.setdefault(facet, {}).setdefault(value, {})[name] = entry
    return Comparison(metrics, groups, per_row)


def _measure(name: str, rows: Sequence[ScoredRow], answers: Sequence[str], index: Sequence[int]) -> Measured:
    return measure(
        name,
        [answers[at] for at in index],
        [rows[at].references for at in index],
        [rows[at].options for at in index],
    )


def _places(rows: Sequence[ScoredRow], index: Sequence[int], facet: str) -> dict[str, np.ndarray]:
    """Returns, per value of a facet, the places within ``index`` that have it, the most frequent first."""
    found: dict[str, list[int]] = {}
    for place, at in enumerate(index):
        if value := rows[at].facet(facet):
            found.setdefault(value, []).append(place)
    ordered = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    return {value: np.asarray(places) for value, places in ordered}


def _entry(
    measured: Mapping[str, Measured],
    pairs: Sequence[Pair],
    media: Sequence[str],
    chosen: np.ndarray,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Returns a metric over the ``chosen`` rows, for the report: the interval of every model, and how pairs differ."""
    own = {
        model: replace(found, values=found.values[chosen], weights=found.weights[chosen])
        for model, found in measured.items()
    }
    drawn: dict[str, Any] = {"groups": [media[place] for place in chosen], "resamples": resamples, "seed": seed}
    intervals = {
        model: bootstrap(found.values, weights=found.weights, most=found.most, **drawn) for model, found in own.items()
    }
    first, any_interval = next(iter(own.values())), next(iter(intervals.values()))
    entry: dict[str, Any] = {
        "n": any_interval.n,
        "media_groups": any_interval.groups,
        "higher_is_better": first.higher_is_better,
        "normaliser": NORMALISERS.get(first.name, ""),
        "models": {model: _rounded(interval) for model, interval in intervals.items()},
    }
    differences = [_difference(own[one], own[two], drawn) for one, two in pairs]
    if len(own) == 2 and pairs:
        entry["difference"] = differences[0]
    elif pairs:
        adjusted = holm([found["p"] for found in differences])
        entry["steps"] = [
            {"first": one, "second": two, **found, "p_holm": round(p, 6)}
            for (one, two), found, p in zip(pairs, differences, adjusted, strict=True)
        ]
    return entry


def _difference(before: Measured, after: Measured, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the paired difference of two models over the same rows, as the report writes it."""
    found = paired_difference(
        before.values,
        after.values,
        first_weights=before.weights,
        second_weights=after.weights,
        higher_is_better=before.higher_is_better,
        **drawn,
    )
    numbers = {key: value for key, value in asdict(found).items() if key != "n"}
    return {key: round(value, 6 if key.startswith("p") else 4) for key, value in numbers.items()}


def _rounded(interval: Interval) -> dict[str, float]:
    return {"value": round(interval.value, 4), "low": round(interval.low, 4), "high": round(interval.high, 4)}


def perplexities(
    losses: Mapping[str, tuple[np.ndarray, np.ndarray]],
    media: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns every model's perplexity of the reference answers, and the difference of mean losses.

    Args:
        losses: Model name to ``(nll, tokens)`` per row.
        media: Group of every row.
        resamples: Bootstrap samples.
        seed: Of the bootstrap.
    """
    models, tokens = {}, 0
    for model, (nll, counts) in losses.items():
        found = bootstrap(nll, weights=counts, groups=media, resamples=resamples, seed=seed)
        models[model] = {key: _exp(getattr(found, key)) for key in ("value", "low", "high")}
        tokens = int(counts.sum())
    entry: dict[str, Any] = {"n": len(media), "tokens": tokens, "higher_is_better": False, "models": models}
    if len(losses) == 2:
        (first, first_tokens), (second, second_tokens) = losses.values()
        found_difference = paired_difference(
            first,
            second,
            first_weights=first_tokens,
            second_weights=second_tokens,
            groups=media,
            higher_is_better=False,
            resamples=resamples,
            seed=seed,
        )
        kept = ("value", "low", "high", "p")
        entry["loss_difference"] = {key: round(getattr(found_difference, key), 6) for key in kept}
    return entry


def _exp(loss: float) -> float:
    # Perplexities beyond this are noise, and JSON has no infinity.
    return round(math.exp(min(loss, 50.0)), 4)


def check_bars(least: Mapping[str, float]) -> None:
    """Raises RecipeError for a bar that no gate can mean: of an unknown metric, or a fraction where scores are of 100.

    An error rate may well be held below 1 %; a score of at most 1 of 100 stops nothing.
    """
    for name, bar in least.items():
        check_metric(name)
        if 0 < bar <= 1 and name not in ERROR_RATES:
            raise RecipeError(
                f"eval.fail_under: {name} {bar:g} would never fail, scores are of 100",
                f"write {name}: {100 * bar:g}",
                "bar_is_a_fraction",
            )


def failed_gates(metrics: Mapping[str, Any], model: str, least: Mapping[str, float]) -> list[str]:
    """Returns one line per metric of a model that misses its bar; a metric that was not scored misses it."""
    lines = []
    for name, bar in least.items():
        entry = metrics.get(name)
        if entry is None:
            lines.append(f"{name} was not scored (bar {bar:g})")
            continue
        value = entry["models"][model]["value"]
        missed = value < bar if entry["higher_is_better"] else value > bar
        if missed:
            lines.append(f"{name} of {model} is {value:.2f}, the bar is {bar:g}")
    return lines


def answered_rows(
    rows: Sequence[ScoredRow], texts: Mapping[str, Sequence[str]], comparison: Comparison
) -> list[AnsweredRow]:
    """Returns every row with the models' answers to it and their scores."""
    return [
        AnsweredRow(
            row,
            {model: answers[at] for model, answers in texts.items()},
            {model: scores[at] for model, scores in comparison.per_row.items()},
        )
        for at, row in enumerate(rows)
    ]
