"""extract.twins at work: held-out units that may be training units in another file, listed and warned of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmtune.features.table import open_features
from mmtune.features.twins import Twins, near_twins
from mmtune.features.units import FeatureKind
from mmtune.talk import Talk

LIST = "twins.jsonl"


def find_twins(bounds: Mapping[FeatureKind, float], folder: Path, target: Path, console: Talk) -> dict[str, Any]:
    """Returns what the manifest says of near twins, after writing them to ``twins.jsonl``.

    Args:
        bounds: Kind of features to the least cosine.
        folder: The features folder that is being made; what has no features there is left out.
        target: Where it will stand.
        console: Where twins are warned of.
    """
    facts: dict[str, Any] = {}
    with open(folder / LIST, "w", encoding="utf-8", errors="backslashreplace") as handle:
        for kind, least in bounds.items():
            if not (folder / kind).is_dir():
                continue
            twins = near_twins(open_features(folder, kind), least)
            for twin in twins.found:
                handle.write(json.dumps({"kind": kind, **asdict(twin)}, ensure_ascii=False) + "\n")
            facts[kind] = {"least": least, **twins.facts()}
            _say(kind, least, twins, target, console)
    return facts


def _say(kind: str, least: float, twins: Twins, target: Path, console: Talk) -> None:
    if twins.median is None:
        console.note(f"extract.twins: {kind}: {_why_not(twins)}, so there is nothing to compare")
        return
    splits = twins.facts()["splits"]
    counts = ", ".join(f"{split} {own['twins']:,} of {own['units']:,}" for split, own in splits.items())
    bound = f"cosine {least:g} or more; the nearest's median {twins.median:.3f}"
    said = f"{kind} with a near twin in train: {counts} ({bound})"
    if twins.found:
        console.note(f"{said}; what is scored on them may be remembered: {target}/{LIST}")
    else:
        console.say(f"extract: {said}")


def _why_not(twins: Twins) -> str:
    """Returns why nothing was compared."""
    if twins.asked:
        return "train shows none"
    if not twins.shared:
        return "train alone shows any"
    counts = " and ".join(f"{split} ({count:,})" for split, count in sorted(twins.shared.items()))
    return f"all that {counts} shows is in train itself, which build-data counts as shared"
