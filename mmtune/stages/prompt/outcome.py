"""What a search found, scored on dev and on rows that nothing was chosen by, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mmtune.evaluation.intervals import bootstrap, paired_difference
from mmtune.prompts.searched import SearchedPrompt
from mmtune.records import Example
from mmtune.stages.prompt.asking import Asker, metric_of
from mmtune.talk import Talk, counted

NAMES = {"start": "where the search began", "best": "what it found", "random": "random search, equal calls"}


@dataclass(frozen=True)
class Scoring:
    """How prompts are scored for the report.

    Attributes:
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """

    resamples: int
    seed: int


def scored(
    prompts: Mapping[str, SearchedPrompt], splits: Mapping[str, Sequence[Example]], asker: Asker, how: Scoring
) -> dict[str, Any]:
    """Returns every prompt's score by its rows' own metric on every split, and the differences to the best.

    Args:
        prompts: ``start``, ``best`` and perhaps ``random``; equal prompts are asked once.
        splits: ``dev`` and ``test`` to their rows.
        asker: Asks the model.
        how: Of the intervals.
    """
    asked: dict[tuple[str, str], np.ndarray] = {}
    scores: dict[str, dict[str, Any]] = {name: {} for name in prompts}
    differences: dict[str, dict[str, Any]] = {}
    for split, examples in splits.items():
        groups = [example.group or example.id for example in examples]
        values = {}
        for name, prompt in prompts.items():
            same = (split, repr(prompt))
            if same not in asked:
                asked[same] = 100.0 * asker.answered(prompt, examples, "metric").rewards
            values[name] = asked[same]
            found = bootstrap(values[name], groups=groups, resamples=how.resamples, seed=how.seed)
            scores[name][split] = {key: _round(value) for key, value in asdict(found).items()}
        for name in prompts:
            if name != "best":
                difference = paired_difference(
                    values[name], values["best"], groups=groups, resamples=how.resamples, seed=how.seed
                )
                found_difference = {key: _round(value) for key, value in asdict(difference).items()}
                differences.setdefault(f"best - {name}", {})[split] = found_difference
    return {"scores": scores, "differences": differences}


def metric_names(examples: Sequence[Example]) -> list[str]:
    """Returns the metrics that rows are scored by."""
    return list(dict.fromkeys(metric_of(example) for example in examples))


def say(document: Mapping[str, Any], console: Talk) -> None:
    """Prints the table, the prompt and the verdict."""
    rows = [
        (NAMES[name], *(f"{found[split]['value']:.2f} [{_span(found[split])}]" for split in ("dev", "test")))
        for name, found in document["scores"].items()
    ]
    head = (f"{document['method']}, {', '.join(document['metrics'])}", "dev", f"{document['test_split']} (untouched)")
    console.table(f"prompt: {document['calls']['search']:,} model calls", head, rows)
    kept = "" if document["changed"] else "nothing better was found; it stays "
    console.say(f"prompt: {kept}{document['prompt']['instruction']!r}{_more(document['prompt'])}")
    for other, found in document["differences"].items():
        console.say(f"prompt: {other} on {document['test_split']}: {verdict(found['test'])}")
    console.say(f"prompt: gap between dev and {document['test_split']}: {document['gap_dev_test']:+.2f}")
    if document["refused"]:
        listed = ", ".join(f"{reason} {count:,}" for reason, count in sorted(document["refused"].items()))
        console.say(f"prompt: proposals refused: {listed}")


def verdict(found: Mapping[str, Any]) -> str:
    """Returns a difference in words: better or worse where the interval and the paired test agree, else a tie."""
    clear = (found["low"] > 0 or found["high"] < 0) and found["p"] < 0.05
    p = "< 0.001" if found["p"] < 0.001 else f"= {found['p']:.3f}"
    word = ("better" if found["value"] > 0 else "worse") if clear else "a tie"
    return f"{word} ({found['value']:+.2f}, 95 % {found['low']:+.2f} to {found['high']:+.2f}, p {p})"


def _more(prompt: Mapping[str, Any]) -> str:
    shown = f", {counted(len(prompt['exemplars']), 'exemplar')}" if prompt["exemplars"] else ""
    words = ", ".join(f"{label} = {word}" for label, word in prompt["words"].items())
    shown += " behind soft tokens" if prompt.get("soft") else ""
    return f"{shown}{f', words {words}' if words else ''}"


def _span(found: Mapping[str, float]) -> str:
    return f"{found['low']:.2f} to {found['high']:.2f}"


def _round(value: float) -> float:
    return round(value, 4) if isinstance(value, float) else value
