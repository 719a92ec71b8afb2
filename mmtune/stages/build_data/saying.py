"""What build-data says of the rows that it built, on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtune.prompts.delimiters import TURNS
from mmtune.talk import Talk, counted


def say_result(
    rows: Mapping[str, int], drops: Mapping[str, int], facts: Mapping[str, Any], target: Path, console: Talk
) -> None:
    """Says what became of every source, of the mixture and the exemplars, and what was refused.

    Args:
        rows: Split to its rows.
        drops: Reason to how many rows were refused.
        facts: The manifest's.
        target: The finished folder.
        console: Where it is said.
    """
    console.table(
        "build-data",
        ("source", "split", "reader", "read", "rows", "rejected"),
        [
            (fact["id"], fact["split"], fact["reader"], fact["read"], fact["rows"], fact["read"] - fact["rows"])
            for fact in facts["sources"]
        ],
    )
    held = {name for names in facts.get("mixture", {}).get("held_out", {}).values() for name in names}
    for fact in facts["sources"]:
        if not fact["rows"] and not (fact["split"] == "train" and fact["id"] in held):
            console.note(f"source {fact['id']!r} ({fact['split']}) gave no row; see rejects.jsonl")
    if "mixture" in facts:
        _say_mixture(facts["mixture"], console)
    if "exemplars" in facts:
        _say_exemplars(facts["exemplars"], console)
    if drops:
        listed = ", ".join(f"{reason} {count:,}" for reason, count in drops.items())
        refused = f"{sum(drops.values()):,} of {counted(facts['read'], 'row')} were refused: {listed}"
        console.note(f"{refused} ({target}/rejects.jsonl)")
    for pair, shared in facts["leakage"].items():
        console.note(f"{pair} share {shared['media']:,} media and {shared['questions']:,} questions on the same media")
    counts = ", ".join(f"{split} {count:,}" for split, count in rows.items())
    console.say(f"build-data: {counts} {'row' if list(rows.values()) == [1] else 'rows'} in {target}")


def _say_mixture(mixture: dict[str, Any], console: Talk) -> None:
    console.table(
        "mixture",
        ("source", "cluster", "has", "rate", "rows", "repeated"),
        [
            (one["source"], one["cluster"], one["found"], f"{one['rate']:.4f}", one["built"], one["repeated"])
            for one in mixture["sources"]
        ],
    )
    shots = ", ".join(f"{counted(int(count), 'exemplar')} {rows:,}" for count, rows in mixture["shots"].items())
    counts = ", ".join(f"{name} {mixture[name]:,}" for name in ("rationale", "options", "no_options", "inverted"))
    console.say(f"mixture: {counted(mixture['rows'], 'row')}; {shots}; {counts}")
    parted = mixture["delimiters"]
    if set(parted) - {TURNS}:
        listed = ", ".join(f"{name} {rows:,}" for name, rows in parted.items())
        console.say(f"mixture: exemplars parted by {listed}")
    for cluster, sources in mixture["held_out"].items():
        console.say(f"mixture: {cluster} is held out ({', '.join(sources)}): no training row, no exemplar")


def _say_exemplars(facts: Mapping[str, Any], console: Talk) -> None:
    """Says how many training rows show how many exemplars."""
    by = f" by {' and '.join(facts['by'])}" if facts["by"] else ""
    counts = ", ".join(f"{counted(int(count), 'exemplar')} {rows:,}" for count, rows in facts["shots"].items())
    console.say(f"build-data: exemplars by {facts['method']}{by}: training rows with {counts}")
    if facts["no_features"]:
        console.note(
            f"{facts['no_features']:,} training rows have no features to be compared by; they show no exemplar"
        )
