"""extract: sources to ``features/``: what frozen encoders make of every distinct medium, text and history."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtune.errors import DataError, IntegrityError
from mmtune.features.index import build_index
from mmtune.features.table import FeatureTable, open_features
from mmtune.features.units import FeatureKind, Gathered
from mmtune.files import disk_errors
from mmtune.recipe import Extract, Recipe
from mmtune.records import Reject
from mmtune.stages.extract.encoders import Chosen, choose, write_small
from mmtune.stages.extract.filling import Filled, Filler
from mmtune.stages.extract.units import gather_units
from mmtune.storage import Manifest, RejectLog, Staging, foresee, is_finished, open_stage, read_manifest
from mmtune.talk import Talk

# The towers' outputs that finetune keeps stand in the same folder and are its own.
_OTHERS = ("towers",)


def extract(
    recipe: Recipe,
    *,
    force: bool = False,
    dry_run: bool = False,
    limit: int | None = None,
    offline: bool = False,
    console: Talk,
) -> dict[str, Any]:
    """Returns the counts of ``features/`` after making it, or of the finished one.

    Args:
        recipe: ``sources``, ``extract``, ``model``, ``seed`` and the limits of ``build`` are read.
        force: Make all features again.
        dry_run: Look at the sources and say what would be done; write nothing.
        limit: At most this many rows of each source.
        offline: Never reach for the network.
        console: Where the talk goes.

    Raises:
        RecipeError: A source is incomplete, or no encoder is named for what the sources hold.
        DataError: Nothing has features, or an encoder's numbers overflow fp16.
        CapabilityError: An encoder, or a library that it needs, is not at hand.
    """
    settings = recipe.extract or Extract()
    gathered, media_root = gather_units(recipe, settings, limit)
    chosen = choose(recipe, settings, gathered.units, _known_items(gathered), offline)
    config = {
        "encoders": {kind: dict(one.identity) for kind, one in chosen.items()},
        "index": settings.index.model_dump(),
        "seed": recipe.seed,
        "media_root": media_root,
    }
    inputs = {"units": gathered.digest}
    target = recipe.run_dir / "features"
    if dry_run:
        plan = foresee(target, stage="extract", config=config, inputs=inputs, force=force, others=_OTHERS)
        counts: dict[str, int] = {kind: len(units) for kind, units in gathered.units.items()}
        console.say(f"{plan}; {_listed(counts)} of {gathered.read:,} rows")
        return {"stage": "extract", "dry_run": True, "target": str(target), "distinct": counts, "read": gathered.read}
    staging = open_stage(
        target, stage="extract", config=config, inputs=inputs, force=force, others=_OTHERS, say=console.say
    )
    if staging is None:
        return _result(target, read_manifest(target), cached=True)
    with staging, disk_errors(f"writing {target}"):
        run = _Run(recipe, settings, gathered, media_root, chosen, offline, console)
        manifest = run.write(staging, {} if force else _old_features(target, chosen))
    return _result(target, manifest, cached=False)


def _known_items(gathered: Gathered) -> list[str]:
    """Returns the items that a small encoder learns the names of: those of the train split, if there is one."""
    units = gathered.units.get("behaviour", ())
    trained = [unit for unit in units if "train" in gathered.splits[unit.kind, unit.id]]
    return sorted({item for unit in (trained or units) for item in unit.items})


def _old_features(target: Path, chosen: Mapping[FeatureKind, Chosen]) -> dict[FeatureKind, FeatureTable]:
    """Returns the finished features whose encoder is still the same."""
    if not is_finished(target):
        return {}
    try:
        made = read_manifest(target).facts.get("fingerprints", {})
        return {kind: open_features(target, kind) for kind, one in chosen.items() if made.get(kind) == one.fingerprint}
    except (IntegrityError, DataError):
        return {}


class _Run:
    """One run that makes features."""

    def __init__(
        self,
        recipe: Recipe,
        settings: Extract,
        gathered: Gathered,
        media_root: str,
        chosen: Mapping[FeatureKind, Chosen],
        offline: bool,
        console: Talk,
    ) -> None:
        self._recipe, self._settings, self._gathered, self._media_root = recipe, settings, gathered, media_root
        self._chosen, self._offline, self._console = chosen, offline, console
        self._journal = recipe.run_dir / ".features.journal"

    def write(self, staging: Staging, old: Mapping[FeatureKind, FeatureTable]) -> Manifest:
        """Makes every kind of feature, the indexes and the manifest."""
        if staging.reasons == ["--force"]:
            shutil.rmtree(self._journal, ignore_errors=True)
        filled: dict[FeatureKind, Filled] = {}
        with RejectLog(staging.path / "rejects.jsonl") as rejects:
            for reject in self._gathered.rejects:
                rejects.write(reject)
            for kind in self._gathered.units:
                filled[kind] = self._fill(kind, old.get(kind), staging.path)
                for fields in filled[kind].rejects:
                    rejects.write(Reject(**fields))
            drops = dict(sorted(rejects.counts.items()))
        if not any(one.rows for one in filled.values()):
            raise DataError(
                f"nothing has features: {_listed(drops)}", "mend the data or the paths; nothing was written", "no_rows"
            )
        indexes = {kind: self._index(kind, staging.path) for kind, one in filled.items() if one.rows}
        manifest = staging.publish(
            rows={kind: one.rows for kind, one in filled.items() if one.rows},
            drops=drops,
            facts={**self._facts(filled), "index": {kind: facts for kind, facts in indexes.items() if facts}},
            timings={f"{kind}_seconds": round(one.seconds, 3) for kind, one in filled.items()}
            | {f"{kind}_encoder_seconds": round(one.encoder_seconds, 3) for kind, one in filled.items()},
        )
        shutil.rmtree(self._journal, ignore_errors=True)
        if drops:
            self._console.note(
                f"{sum(drops.values()):,} were refused: {_listed(drops)} ({staging.target}/rejects.jsonl)"
            )
        counts = _listed({kind: one.rows for kind, one in filled.items()})
        self._console.say(f"extract: {counts} in {staging.target}")
        return manifest

    def _fill(self, kind: FeatureKind, old: FeatureTable | None, folder: Path) -> Filled:
        one = self._chosen[kind]
        path = one.path
        if one.built is not None:
            path = str(write_small(one, folder / "encoders" / one.encodes))
        filler = Filler(
            kind,
            one,
            path,
            self._settings,
            media_root=self._media_root,
            journal=self._journal,
            offline=self._offline,
            console=self._console,
        )
        units = self._gathered.units[kind]
        splits = {unit.id: self._gathered.splits[kind, unit.id] for unit in units}
        filled = filler.fill(units, splits, old, folder / kind)
        self._console.say(f"extract: {kind}: {_story(filled, len(units))}")
        return filled

    def _index(self, kind: FeatureKind, folder: Path) -> dict[str, Any] | None:
        wanted = self._settings.index
        if wanted.kind == "none":
            return None
        vectors = open_features(folder, kind).pooled()
        made_by, seed = self._chosen[kind].fingerprint, self._recipe.seed
        place = folder / "index" / kind
        facts = build_index(place, vectors, kind=wanted.kind, metric=wanted.metric, source=made_by, seed=seed)
        if facts.kind in ("hnsw", "ivf"):
            found = f"{facts.recall:.1%} of the {facts.recall_at} nearest"
            self._console.say(f"extract: {kind}: the index ({facts.kind}) finds {found}")
        return {"kind": facts.kind, "metric": facts.metric, "count": facts.count, "recall": facts.recall}

    def _facts(self, filled: Mapping[FeatureKind, Filled]) -> dict[str, Any]:
        gathered = self._gathered
        return {
            "media_root": self._media_root,
            "read": gathered.read,
            "refused_rows": gathered.refused,
            "distinct": {kind: len(units) for kind, units in gathered.units.items()},
            "failed": {kind: len(one.rejects) for kind, one in filled.items()},
            "kept": {kind: one.kept for kind, one in filled.items()},
            "width": {kind: one.width for kind, one in filled.items()},
            "tokens": {kind: one.tokens for kind, one in filled.items()},
            "fingerprints": {kind: one.fingerprint for kind, one in self._chosen.items()},
        }


def _story(filled: Filled, units: int) -> str:
    """Returns what became of the units of a kind, in words."""
    made = filled.rows - filled.kept - filled.resumed
    parts = [f"{filled.rows:,} of {units:,} have features"]
    if filled.kept or filled.resumed or filled.changed:
        parts.append(f"{filled.kept:,} kept, {filled.resumed:,} from the run before, {made:,} made")
    if filled.changed:
        parts.append(f"{filled.changed:,} of a file that changed")
    if filled.seconds:
        share = filled.encoder_seconds / filled.seconds
        parts.append(f"{made / filled.seconds:,.1f} rows/s, {share:.0%} of the time in the encoder")
    return "; ".join(parts)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"


def _result(target: Path, manifest: Manifest, *, cached: bool) -> dict[str, Any]:
    facts = manifest.facts
    return {
        "stage": "extract",
        "target": str(target),
        "cached": cached,
        "rows": manifest.rows,
        "distinct": facts["distinct"],
        "failed": facts["failed"],
        "kept": facts["kept"],
        "read": facts["read"],
        "drops": manifest.drops,
        "index": facts["index"],
    }
