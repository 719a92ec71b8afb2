"""extract: sources to ``features/``: what frozen encoders make of every distinct medium, text and history."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtune.errors import DataError, IntegrityError
from mmtune.features.index import build_index
from mmtune.features.joint import JOINT
from mmtune.features.table import FeatureTable, open_features
from mmtune.features.units import FeatureKind, Gathered
from mmtune.prompts.template import check_task
from mmtune.recipe import Extract, Recipe
from mmtune.records import Reject
from mmtune.stages.extract.encoders import Chosen, choose, write_small
from mmtune.stages.extract.filling import Filled, Filler
from mmtune.stages.extract.joining import join
from mmtune.stages.extract.reducing import Reducer
from mmtune.stages.extract.twins import find_twins
from mmtune.stages.extract.units import gather_units
from mmtune.storage import Manifest, RejectLog, Staging, foresee, open_stage, read_manifest, stage_hash, verify_files
from mmtune.talk import Talk, counted

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
    for task in (task for source in recipe.sources for task in (*source.tasks, source.task) if task):
        check_task(task)
    settings = recipe.extract or Extract()
    gathered, media_root = gather_units(recipe, settings, limit)
    chosen = choose(recipe, settings, gathered.units, _known_items(gathered), offline)
    config = {
        "encoders": {kind: dict(one.identity) for kind, one in chosen.items()},
        "index": settings.index.model_dump(),
        "joint": list(settings.joint),
        "reduce": settings.reduce.model_dump() if settings.reduce else None,
        "twins": settings.twins,
        "seed": recipe.seed,
        "media_root": media_root,
    }
    inputs = {"units": gathered.digest}
    target = recipe.run_dir / "features"
    if dry_run:
        plan = foresee(target, stage="extract", config=config, inputs=inputs, force=force, others=_OTHERS)
        counts: dict[str, int] = {kind: len(units) for kind, units in gathered.units.items()}
        console.say(f"{plan}; {_listed(counts)} of {counted(gathered.read, 'row')}")
        return {"stage": "extract", "dry_run": True, "target": str(target), "distinct": counts, "read": gathered.read}
    staging = open_stage(
        target, stage="extract", config=config, inputs=inputs, force=force, others=_OTHERS, say=console.say
    )
    if staging is None:
        return _result(target, read_manifest(target), cached=True)
    with staging:
        run = _Run(recipe, settings, gathered, media_root, chosen, offline, console)
        manifest = run.write(staging, {} if force else _old_features(target, chosen, console))
    return _result(target, manifest, cached=False)


def _known_items(gathered: Gathered) -> list[str]:
    """Returns the items that a small encoder learns the names of: those of the train split, if there is one."""
    units = gathered.units.get("behaviour", ())
    trained = [unit for unit in units if "train" in gathered.splits[unit.kind, unit.id]]
    return sorted({item for unit in (trained or units) for item in unit.items})


def _old_features(target: Path, chosen: Mapping[FeatureKind, Chosen], console: Talk) -> dict[FeatureKind, FeatureTable]:
    """Returns the finished, undamaged features whose encoder is still the same, without what is made of them."""
    found: dict[FeatureKind, FeatureTable] = {}
    try:
        manifest = read_manifest(target)
    except (IntegrityError, DataError):
        return found
    made = manifest.facts.get("fingerprints", {})
    for kind in (kind for kind, one in chosen.items() if made.get(kind) == one.fingerprint):
        try:
            verify_files(target, manifest, kind)
            found[kind] = open_features(target, kind).not_reduced()
        except IntegrityError as damage:
            console.note(f"extract: {kind}: all features are made again: {damage.message}")
        except DataError:
            # All units of the kind were refused.
            continue
    return found


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
        self._reducer = Reducer(settings.reduce, recipe.seed, console) if settings.reduce else None

    def write(self, staging: Staging, old: Mapping[FeatureKind, FeatureTable]) -> Manifest:
        """Makes every kind of feature, what is made of them, the indexes and the manifest."""
        if staging.reasons == ["--force"]:
            shutil.rmtree(self._journal, ignore_errors=True)
        filled, drops = self._filled(old, staging.path)
        rows: dict[str, int] = {kind: one.rows for kind, one in filled.items() if one.rows}
        made_by: dict[str, str] = {kind: self._chosen[kind].fingerprint for kind in filled if kind in rows}
        reduced: dict[str, Any] = {kind: one.reduced for kind, one in filled.items() if one.reduced}
        if self._settings.joint:
            joint = join(self._gathered.joint, self._settings.joint, staging.path, self._reducer_of(JOINT))
            rows[JOINT] = joint.rows
            made_by[JOINT] = stage_hash({"joint": {kind: made_by[kind] for kind in self._settings.joint}})
            reduced |= {JOINT: joint.reduced} if joint.reduced else {}
        sources = {name: stage_hash({own: reduced[name]}) if name in reduced else own for name, own in made_by.items()}
        indexes = {name: self._index(name, source, staging.path) for name, source in sources.items()}
        bounds = self._settings.twins
        twins = find_twins(bounds, staging.path, staging.target, self._console) if bounds else {}
        manifest = staging.publish(
            rows=rows,
            drops=drops,
            facts={
                **self._facts(filled),
                "twins": twins,
                "reduced": reduced,
                "index": {name: facts for name, facts in indexes.items() if facts},
            },
            timings={f"{kind}_seconds": round(one.seconds, 3) for kind, one in filled.items()}
            | {f"{kind}_encoder_seconds": round(one.encoder_seconds, 3) for kind, one in filled.items()},
        )
        shutil.rmtree(self._journal, ignore_errors=True)
        if drops:
            refused_rows, of_all = manifest.facts["refused_rows"], sum(drops.values())
            refused = ((refused_rows, "row"), (of_all - refused_rows, "unit"))
            said = " and ".join(counted(count, what) for count, what in refused if count)
            self._console.note(f"refused {said}: {_listed(drops)} ({staging.target}/rejects.jsonl)")
        self._console.say(f"extract: {_listed(rows)} in {staging.target}")
        return manifest

    def _filled(
        self, old: Mapping[FeatureKind, FeatureTable], folder: Path
    ) -> tuple[dict[FeatureKind, Filled], dict[str, int]]:
        """Returns what became of every kind of unit, and what was refused by reason."""
        filled: dict[FeatureKind, Filled] = {}
        with RejectLog(folder / "rejects.jsonl") as rejects:
            for reject in self._gathered.rejects:
                rejects.write(reject)
            for kind in self._gathered.units:
                filled[kind] = self._fill(kind, old.get(kind), folder)
                for fields in filled[kind].rejects:
                    rejects.write(Reject(**fields))
            drops = dict(sorted(rejects.counts.items()))
        if not any(one.rows for one in filled.values()):
            raise DataError(
                f"nothing has features: {_listed(drops)}", "mend the data or the paths; nothing was written", "no_rows"
            )
        return filled, drops

    def _reducer_of(self, name: str) -> Reducer | None:
        return self._reducer if self._reducer and self._reducer.wants(name) else None

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
            self._reducer_of(kind),
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

    def _index(self, name: str, source: str, folder: Path) -> dict[str, Any] | None:
        wanted = self._settings.index
        if wanted.kind == "none":
            return None
        vectors, seed = open_features(folder, name).compared(), self._recipe.seed
        place = folder / "index" / name
        facts = build_index(place, vectors, kind=wanted.kind, metric=wanted.metric, source=source, seed=seed)
        if facts.kind in ("hnsw", "ivf"):
            found = f"{facts.recall:.1%} of the {facts.recall_at} nearest"
            self._console.say(f"extract: {name}: the index ({facts.kind}) finds {found}")
        return {"kind": facts.kind, "metric": facts.metric, "count": facts.count, "recall": facts.recall}

    def _facts(self, filled: Mapping[FeatureKind, Filled]) -> dict[str, Any]:
        gathered = self._gathered
        return {
            "media_root": self._media_root,
            "read": gathered.read,
            "refused_rows": gathered.refused,
            "refused_units": len(gathered.rejects)
            - gathered.refused
            + sum(len(one.rejects) for one in filled.values()),
            "distinct": {kind: len(units) for kind, units in gathered.units.items()},
            "failed": {kind: len(one.rejects) for kind, one in filled.items()},
            "kept": {kind: one.kept for kind, one in filled.items()},
            "width": {kind: one.width for kind, one in filled.items()},
            **({"tokens": {kind: one.tokens for kind, one in filled.items()}} if self._settings.tokens else {}),
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
    working = filled.seconds - filled.starting_seconds
    if working > 0:
        rate, share = made / working, filled.encoder_seconds / working
        start = f"after {filled.starting_seconds:.1f} s of start-up"
        parts.append(f"{rate:,.1f} rows/s {start}, {share:.0%} of that time in the encoder")
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
        "reduced": facts["reduced"],
        "index": facts["index"],
        "twins": facts["twins"],
    }
