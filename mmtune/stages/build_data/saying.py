"""What build-data says of the rows that it built, on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmtune.prompts.delimiters import TURNS
from mmtune.prompts.forms import Template
from mmtune.prompts.template import POOLS
from mmtune.recipe import Build, Recipe
from mmtune.stages.build_data.tally import first_reject
from mmtune.talk import Talk, counted


def say_result(
    rows: Mapping[str, int],
    drops: Mapping[str, int],
    facts: Mapping[str, Any],
    target: Path,
    console: Talk,
    recipe: Recipe,
) -> None:
    """Says what became of every source, of the mixture and the exemplars, and what was refused.

    Args:
        rows: Split to its rows.
        drops: Reason to how many rows were refused.
        facts: The manifest's.
        target: The finished folder.
        console: Where it is said.
        recipe: What was asked for.
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
    for fact, source in zip(facts["sources"], recipe.sources, strict=True):
        if not fact["rows"] and not (fact["split"] == "train" and fact["id"] in held):
            part = "; see rejects.jsonl"
            if not fact["read"] and source.part != (0.0, 1.0):
                part = f": nothing of it falls into part {list(source.part)}, in which rows of a medium stay together"
            console.note(f"source {fact['id']!r} ({fact['split']}) gave no row{part}")
    if "mixture" in facts:
        _say_mixture(facts["mixture"], console)
    if "exemplars" in facts:
        _say_exemplars(facts["exemplars"], console)
    drawn = _worded(recipe, facts)
    if drawn:
        plain = sorted({one.id for tasks in drawn.values() for task in tasks for one in POOLS[task] if _bare(one)})
        bare = f", or the question as it stands (template: {' or '.join(plain)} of a source)" if plain else ""
        console.say(
            f"build-data: each row of {', '.join(drawn)} is asked in a wording drawn from a pool; for all in one set"
            f" build.templates=first{bare}"
        )
    for line in _in_vain(recipe.build, facts):
        console.note(line)
    if drops:
        listed = ", ".join(f"{reason} {count:,}" for reason, count in drops.items())
        were = "was" if sum(drops.values()) == 1 else "were"
        refused = f"{sum(drops.values()):,} of {counted(facts['read'], 'row')} {were} refused: {listed}"
        log = target / "rejects.jsonl"
        console.note(f"{refused}{first_reject(log, drops)} (all in {log})")
    for pair, shared in facts["leakage"].items():
        console.note(f"{pair} share {_shared(shared)}")
    counts = ", ".join(f"{split} {count:,}" for split, count in rows.items())
    console.say(f"build-data: {counts} {'row' if list(rows.values()) == [1] else 'rows'} in {target}")


def _worded(recipe: Recipe, facts: Mapping[str, Any]) -> dict[str, set[str]]:
    """Returns the tasks of every source whose rows are worded by shipped templates, a draw per row."""
    if recipe.build.prompt is not None:
        return {}
    pooled = {
        (source.id, source.split)
        for source in recipe.sources
        if source.template is None and (source.templates or recipe.build.templates) == "pool"
    }
    found: dict[str, set[str]] = {}
    for one in facts["sources"]:
        # A conversation is as it is, and so is a task with one wording.
        tasks = {task for task in one["tasks"] if len(POOLS.get(task, ())) > 1}
        if tasks and (one["id"], one["split"]) in pooled:
            found.setdefault(one["id"], set()).update(tasks)
    return found


def _bare(template: Template) -> bool:
    return template.prompt == "{question}"


def _shared(found: Mapping[str, int]) -> str:
    """Returns what two splits share, in words; rows without media share questions alone."""
    if not found["media"]:
        return f"{counted(found['questions'], 'question')} (the same text in both)"
    return f"{found['media']:,} media and {found['questions']:,} questions on the same media"


def _in_vain(build: Build, facts: Mapping[str, Any]) -> Iterator[str]:
    """Yields what was asked of training rows and no row does: else a wrong setting looks like a right one."""
    shots = facts.get("mixture", facts.get("exemplars", {})).get("shots", {})
    unmet = [str(count) for count, share in build.shots.items() if share and not shots.get(str(count))]
    if unmet:
        yield (
            f"no training row shows {' or '.join(unmet)} exemplars, as build asks for:"
            " conversations take none, nor do rows whose pool is too small"
        )
    found = facts.get("mixture")
    if found is None or build.mixture is None:
        return
    if build.mixture.inverted and not found["inverted"]:
        yield "mixture.inverted turns no row round: none of their templates is an inverted one"
    if build.mixture.options is not None and not found["options"] + found["no_options"]:
        yield "mixture.options lists none: no training row has options"


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
