"""Predictions to scores: generation, metrics by name, and how sure the numbers are."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmtune.errors import RecipeError
from mmtune.evaluation.caption import cider, corpus_bleu, rouge_l
from mmtune.evaluation.labels import entity_matches, macro_f1
from mmtune.evaluation.text import (
    accuracy,
    character_errors,
    exact_match,
    relaxed_accuracy,
    token_f1,
    word_errors,
)
from mmtune.evaluation.vqa import vqa_accuracy

METRICS: dict[str, Callable[[str, Sequence[str], Sequence[str]], float]] = {
    "vqa_accuracy": vqa_accuracy,
    "exact_match": exact_match,
    "accuracy": accuracy,
    "relaxed_accuracy": relaxed_accuracy,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
}
"""Name to ``(prediction, references, options) -> 0..100`` of one answer; the score is the mean."""

ERROR_RATES: dict[str, Callable[[str, Sequence[str]], tuple[int, int]]] = {
    "wer": word_errors,
    "cer": character_errors,
}
"""Name to ``(prediction, references) -> (errors, length)``; lower is better, summed over the rows."""

RATIOS: dict[str, Callable[[str, Sequence[str]], tuple[float, float]]] = {"entity_f1": entity_matches}
"""Name to ``(prediction, references) -> (part, whole)``; higher is better, summed over the rows."""

CORPUS_METRICS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]] = {
    "cider": cider,
    "macro_f1": macro_f1,
}
"""Name to ``(predictions, references) -> one value per row`` where a row's value depends on all references."""

BY_CLASS = frozenset({"macro_f1"})
"""Metrics that average classes: the score of a part of the rows is measured among them, since one row bears more than
100 where its class is rare."""

NORMALISERS: dict[str, str] = {
    "vqa_accuracy": "VQA v2 official",
    "exact_match": "SQuAD v2",
    "accuracy": "case and outer punctuation ignored",
    "relaxed_accuracy": "ChartQA 5 %",
    "token_f1": "SQuAD v2",
    "rouge_l": "lower-case words",
    "macro_f1": "case and outer punctuation ignored",
    "entity_f1": "case and spaces ignored",
    "cider": "lower-case words",
    "bleu": "lower-case words",
    "wer": "case-folded words",
    "cer": "case-folded words",
}
"""Metric to what is stripped or forgiven before texts are compared."""

TASK_METRICS: dict[str, tuple[str, ...]] = {
    "caption": ("cider", "rouge_l"),
    "instruction": ("token_f1",),
    "conversation": ("token_f1",),
    "dialogue": ("token_f1",),
    "question_answering": ("exact_match", "token_f1"),
    "sentiment_analysis": ("accuracy", "macro_f1"),
    "named_entity_recognition": ("entity_f1",),
    "recommendation": ("accuracy",),
}
"""Metrics of tasks whose examples name none."""

NAMES = (*METRICS, *ERROR_RATES, *RATIOS, *CORPUS_METRICS)
"""Every metric that gives one value per row."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One metric over some rows, as values and weights whose ratio of sums is the score.

    Attributes:
        values: ``(N,)`` in percent of the weight.
        weights: ``(N,)``; 1 for a mean, the reference's length for an error rate.
    """

    name: str
    values: np.ndarray
    weights: np.ndarray
    higher_is_better: bool

    @property
    def score(self) -> float:
        """The score of all rows together."""
        total = self.weights.sum()
        return float(self.values.sum() / total) if total else 0.0

    @property
    def most(self) -> float:
        """What no score of this metric is above."""
        return 100.0 if self.higher_is_better and self.name != "cider" else math.inf


def check_metric(name: str, also: Sequence[str] = ()) -> None:
    """Raises RecipeError with the nearest name unless a metric is known.

    Args:
        name: The metric.
        also: Further names that its place knows.
    """
    if name not in NAMES:
        names = (*NAMES, *also)
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RecipeError(f"unknown metric {name!r}", f"{hint}metrics: {', '.join(names)}", "unknown_metric")


def measure(
    name: str,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    options: Sequence[Sequence[str]] | None = None,
) -> Measured:
    """Returns a metric's value for every row.

    Raises:
        RecipeError: There is no such metric.
    """
    check_metric(name)
    if name in ERROR_RATES or name in RATIOS:
        count = ERROR_RATES.get(name) or RATIOS[name]
        pairs = [count(text, wanted) for text, wanted in zip(predictions, references, strict=True)]
        counts = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
        return Measured(name, 100.0 * counts[:, 0], counts[:, 1], name in RATIOS)
    if name in CORPUS_METRICS:
        values = CORPUS_METRICS[name](predictions, references)
    else:
        choices = options if options is not None else [()] * len(predictions)
        rows = zip(predictions, references, choices, strict=True)
        values = [METRICS[name](text, wanted, choice) for text, wanted, choice in rows]
    return Measured(name, np.asarray(values, dtype=np.float64), np.ones(len(values)), True)


def metrics_of(task: str, metric: str, chosen: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the metrics that an example is scored with.

    Args:
        task: The example's task.
        metric: The metric that the example names; ``none`` or empty when it names none.
        chosen: Metrics that the recipe asks for, or None for each task's own.
    """
    if chosen is not None:
        return tuple(chosen)
    return (metric,) if metric and metric != "none" else TASK_METRICS.get(task, ())


__all__ = [
    "BY_CLASS",
    "CORPUS_METRICS",
    "ERROR_RATES",
    "METRICS",
    "NAMES",
    "NORMALISERS",
    "RATIOS",
    "TASK_METRICS",
    "Measured",
    "check_metric",
    "corpus_bleu",
    "measure",
    "metrics_of",
]
