"""build-data: raw sources to ``instructions/``.

One process reads the sources in order and cuts them into chunks of fixed size; workers probe
the media of a chunk and build its rows; the chunks are written in the order they were cut. So
the output does not depend on the number of workers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mmtune.errors import DataError, RecipeError
from mmtune.features.units import known_as
from mmtune.files import disk_errors, file_digest
from mmtune.media.content import names_beside
from mmtune.media.known import KnownMedia, MediaPlace, MediumKey, Probe, media_places
from mmtune.media.paths import listing
from mmtune.media.probe import ProbeLimits
from mmtune.prompts.chunk import Asked, Chunk, ChunkBuilder
from mmtune.prompts.overlap import SplitOverlap
from mmtune.prompts.schema import instructions_schema
from mmtune.prompts.searched import SearchedPrompt
from mmtune.readers import find_reader
from mmtune.readers.limit import cut, part, take
from mmtune.readers.repeated import SeenIds, drop_repeated
from mmtune.readers.roots import PATHS, files_of, media_roots
from mmtune.readers.source import SourceFiles
from mmtune.recipe import Build, Recipe, Source
from mmtune.records import Record, Reject
from mmtune.stages.build_data.asking import asked_of, named, template_file
from mmtune.stages.build_data.exemplars import (
    Shown,
    features_of,
    gather_pools,
    plan_exemplars,
    pool_size,
)
from mmtune.stages.build_data.mixing import Mixed, plan_mixture
from mmtune.stages.build_data.saying import say_result
from mmtune.stages.build_data.searched import check_prompt, given_prompt, keeps_slots, placed, prompt_roots
from mmtune.storage import (
    Manifest,
    RejectLog,
    SplitWriter,
    Staging,
    finish_split,
    foresee,
    open_stage,
    read_manifest,
    stage_hash,
)
from mmtune.talk import Talk
from mmtune.workers import in_order, process_count

SPLITS = ("train", "val", "test")
CHUNK_ROWS = 256
_LOOKED_FOR = "check `images`, `audios` and `videos` of the sources: media paths are relative to them"
_INLINE_CHUNKS = 4
_MOST_PROCESSES = 8
"""One process reads for all; more than this would wait for it."""


@dataclass(slots=True)
class Tally:
    """Counts of one source."""

    read: int = 0
    rows: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Sources:
    """The sources of a recipe with everything that reading them takes."""

    recipe: Recipe
    files: list[SourceFiles]
    asked: tuple[Asked, ...]
    places: list[MediaPlace]
    media_root: str
    features: Manifest | None
    limit: int | None
    prompt: SearchedPrompt | None = None
    slots: bool = False

    def homes(self) -> dict[str, tuple[int, MediaPlace]]:
        """Returns every training source's number, and where its media lie."""
        # After the sources' places stands that of a searched prompt's media.
        train = enumerate(zip(self.recipe.sources, self.places, strict=False))
        return {source.id: (at, place) for at, (source, place) in train if source.split == "train"}

    def items(self, at: int) -> Iterator[Record | Reject]:
        """Yields the items of one source, from the start."""
        source, given = self.recipe.sources[at], self.files[at]
        read = find_reader(source.reader)
        caps = [cap for cap in (source.limit, self.limit) if cap is not None]
        items = take(lambda: part(read(given), *source.part), min(caps) if caps else None)
        return items if source.task is None else (named(item, source.task) for item in items)


def build_data(
    recipe: Recipe, *, force: bool = False, dry_run: bool = False, limit: int | None = None, console: Talk
) -> dict[str, Any]:
    """Returns the counts of ``instructions/`` after building it, or of the finished one.

    Args:
        recipe: The recipe; ``sources``, ``build`` and ``seed`` are read.
        force: Build again even if nothing changed.
        dry_run: Check the sources and say what would be done; write nothing.
        limit: At most this many items of each source.
        console: Where the talk goes.

    Raises:
        RecipeError: A source is incomplete, or names an unknown reader or template.
        DataError: A file is missing or damaged, an id stands twice, no row is left, or more
            rows are refused than ``build.max_drop_fraction`` allows.
    """
    if not recipe.sources:
        raise RecipeError("the recipe has no sources", "add `sources:` with at least one dataset", "no_sources")
    asked = tuple(asked_of(source, recipe.build) for source in recipe.sources)
    keep = [template_file(source, recipe.build) is not None for source in recipe.sources]
    files = files_of([source.model_dump() for source in recipe.sources], recipe.seed, keep)
    roots = [
        media_roots(source.reader, given, recipe.run_dir) for source, given in zip(recipe.sources, files, strict=True)
    ]
    given = given_prompt(recipe)
    media_root, places = media_places([*roots, *prompt_roots(given)])
    target, slots = recipe.run_dir / "instructions", keeps_slots(recipe)
    config = {
        "sources": [source.model_dump() for source in recipe.sources],
        "build": recipe.build.model_dump(exclude={"workers"}),
        "seed": recipe.seed,
        "limit": limit,
        **({"slots": True} if slots else {}),
    }
    inputs, features = _inputs(recipe), features_of(recipe)
    parents = {} if features is None else {"features": features.hash}
    if dry_run:
        plan = foresee(target, stage="build-data", config=config, inputs=inputs, parents=parents, force=force)
        return _dry_run(recipe, files, media_root, target, plan, console)
    staging = open_stage(
        target, stage="build-data", config=config, inputs=inputs, parents=parents, force=force, say=console.say
    )
    if staging is None:
        manifest = read_manifest(target)
        return _result(target, manifest.rows, manifest.drops, manifest.facts, skipped=True)
    with staging, disk_errors(f"writing {target}"):
        searched = placed(given, media_root)
        sources = _Sources(recipe, files, asked, places, media_root, features, limit, searched, slots)
        rows, drops, facts = _fill(staging, recipe, sources, console)
        facts = {"media_root": media_root, **facts}
        staging.publish(rows=rows, drops=drops, facts=facts)
    say_result(rows, drops, facts, target, console)
    return _result(target, rows, drops, facts, skipped=False)


def _inputs(recipe: Recipe) -> dict[str, str]:
    """Returns digests of annotation and template files, and of the names and sizes below media folders."""
    found: dict[str, str] = {}
    if recipe.build.prompt is not None:
        found[recipe.build.prompt] = file_digest(Path(recipe.build.prompt))
    for source in recipe.sources:
        given = [getattr(source, key) for key in PATHS]
        for value in (*given, template_file(source, recipe.build)):
            if value is None or str(value) in found:
                continue
            path = Path(value)
            if path.is_file():
                found[str(path)] = file_digest(path)
            elif path.is_dir():
                found[str(path)] = stage_hash({"files": list(listing(path, recipe.run_dir))})
    return found


def _dry_run(
    recipe: Recipe, files: list[SourceFiles], media_root: str, target: Path, plan: str, console: Talk
) -> dict[str, Any]:
    seen = []
    for source, given in zip(recipe.sources, files, strict=True):
        first = next(iter(find_reader(source.reader)(given)), None)
        state = "no rows" if first is None else f"first item: {first.id}"
        if isinstance(first, Reject):
            state = f"first item refused: {first.reason} at {first.where}"
        console.say(f"build-data: would read {source.id} ({source.reader}, {source.split}); {state}")
        seen.append({"id": source.id, "split": source.split, "reader": source.reader, "first": state})
    console.say(f"{plan}; media below {media_root}")
    return {"stage": "build-data", "target": str(target), "dry_run": True, "sources": seen, "media_root": media_root}


def _fill(
    staging: Staging, recipe: Recipe, sources: _Sources, console: Talk
) -> tuple[dict[str, int], dict[str, int], dict[str, Any]]:
    """Writes every split and the rejects; returns rows, drops and facts."""
    build, schema = recipe.build, instructions_schema()
    tallies = [Tally() for _ in sources.files]
    mixed = _mix(recipe, sources, console)
    if mixed is not None:
        check_prompt(sources.prompt, mixed.held_out)
    shown = _exemplars(recipe, sources, mixed)
    writers: dict[str, SplitWriter] = {}
    overlap, known, odd = SplitOverlap(), KnownMedia(), 0
    processes = process_count(build.workers)
    done = in_order(
        partial(
            ChunkBuilder,
            recipe.seed,
            sources.asked,
            build.system,
            _limits(build),
            shown.shares,
            shown.choose,
            shown.order,
            known_as,
            sources.prompt,
            sources.slots,
            names_beside(sources.media_root, () if sources.prompt is None else sources.prompt.media),
        ),
        _work(shown.attach(_chunks(sources, mixed, tallies)), known),
        processes=min(processes, _MOST_PROCESSES) if build.workers == "auto" else processes,
        inline=_INLINE_CHUNKS,
        setting="build.workers",
    )
    with RejectLog(staging.path / "rejects.jsonl") as rejects, console.progress(None, "build-data") as bar:
        for built in done:
            known.add(built.probes)
            for reject in built.rejects:
                rejects.write(reject)
            if built.batch.num_rows:
                if built.split not in writers:
                    path = staging.path / built.split / "shard-00000.arrow"
                    writers[built.split] = SplitWriter(path, schema)
                writers[built.split].write_batch(built.batch)
                overlap.add(built.split, built.keys)
            tally = tallies[built.source]
            tally.rows += built.batch.num_rows
            tally.tasks.update(built.tasks)
            tally.asked.update(built.asked)
            odd += built.odd
            bar.advance(built.batch.num_rows + len(built.rejects))
        drops = dict(sorted(rejects.counts.items()))
    rows = {split: writers[split].close() for split in SPLITS if split in writers}
    _check_drops(tallies, drops, build.max_drop_fraction, staging.path / "rejects.jsonl")
    for split in rows:
        finish_split(staging.path / split, schema)
    facts = {
        "sources": [_source_facts(source, tally) for source, tally in zip(recipe.sources, tallies, strict=True)],
        "read": sum(tally.read for tally in tallies),
        "distinct_media": overlap.distinct_media(),
        "leakage": overlap.counts(),
        "odd_characters": odd,
    }
    if mixed is not None:
        facts["mixture"] = _mixture_facts(recipe, mixed, tallies)
    if shown.shares is not None and shown.shares.shots:
        facts["exemplars"] = shown.facts(_train_asked(recipe, tallies))
    return rows, drops, facts


def _mix(recipe: Recipe, sources: _Sources, console: Talk) -> Mixed | None:
    if recipe.build.mixture is None:
        return None
    console.say("build-data: counting the sources' rows for the mixture")
    return plan_mixture(recipe.build.mixture, recipe.sources, sources.items, recipe.seed, pool_size(recipe.build))


def _exemplars(recipe: Recipe, sources: _Sources, mixed: Mixed | None) -> Shown:
    """Returns how training rows show exemplars, after one more pass over them where no mixture has counted them."""
    size = pool_size(recipe.build)
    pools = mixed.pools if mixed else gather_pools(recipe.sources, sources.items, recipe.seed, size) if size else {}
    places = {name: place for name, (_, place) in sources.homes().items()}
    return plan_exemplars(recipe, pools, places, sources.media_root, sources.features)


def _mixture_facts(recipe: Recipe, mixed: Mixed, tallies: list[Tally]) -> dict[str, Any]:
    train = [
        (source.id, tally) for source, tally in zip(recipe.sources, tallies, strict=True) if source.split == "train"
    ]
    rows = {name: tally.rows for name, tally in train if name in mixed.quotas}
    return mixed.facts(rows, _train_asked(recipe, tallies))


def _train_asked(recipe: Recipe, tallies: list[Tally]) -> Counter[str]:
    asked: Counter[str] = Counter()
    for source, tally in zip(recipe.sources, tallies, strict=True):
        if source.split == "train":
            asked.update(tally.asked)
    return asked


def _limits(build: Build) -> ProbeLimits:
    return ProbeLimits(
        max_image_pixels=build.max_image_pixels,
        max_audio_seconds=build.max_audio_seconds,
        max_video_seconds=build.max_video_seconds,
        decode=build.verify == "decode",
        hash_bytes=build.hash_media,
        embed=build.media == "embed",
    )


def _source_facts(source: Source, tally: Tally) -> dict[str, Any]:
    return {
        "id": source.id,
        "split": source.split,
        "reader": source.reader,
        "read": tally.read,
        "rows": tally.rows,
        "tasks": dict(tally.tasks),
    }


def _check_drops(tallies: list[Tally], drops: dict[str, int], most: float, log: Path) -> None:
    read, rows = sum(tally.read for tally in tallies), sum(tally.rows for tally in tallies)
    first = _first_reject(log)
    listed = ", ".join(f"{reason} {count:,}" for reason, count in drops.items())
    if not rows:
        raise DataError(
            f"no row is left of {read:,}: {listed or 'the sources gave none'}{first}",
            f"{_LOOKED_FOR if 'media_missing' in drops else 'mend the data or the paths'}; nothing was written",
            "no_rows",
        )
    if sum(drops.values()) > most * read:
        raise DataError(
            f"{sum(drops.values()):,} of {read:,} rows were refused, more than build.max_drop_fraction "
            f"({most:g}) allows: {listed}{first}",
            f"{_LOOKED_FOR if 'media_missing' in drops else 'mend the data'}, or raise build.max_drop_fraction; "
            "nothing was written",
            "too_many_drops",
        )


def _first_reject(log: Path) -> str:
    with open(log, encoding="utf-8") as handle:
        line = handle.readline()
    if not line:
        return ""
    first = json.loads(line)
    return f"; the first at {first['where'] or first['id']}: {first['detail'][:300]}"


def _chunks(sources: _Sources, mixed: Mixed | None, tallies: list[Tally]) -> Iterator[Chunk]:
    seen, homes = SeenIds(), sources.homes()
    for at, source in enumerate(sources.recipe.sources):
        items = sources.items(at)
        for piece in cut(items if mixed is None else mixed.take(source, items), CHUNK_ROWS):
            tallies[at].read += len(piece)
            checked = drop_repeated(piece, seen, sources.recipe.build.dedup)
            yield Chunk(at, source.split, sources.places[at], checked, homes=homes)


def _work(chunks: Iterator[Chunk], known: KnownMedia) -> Iterator[tuple[Chunk, Mapping[MediumKey, Probe]]]:
    """Yields each chunk with the probes that are known when it is sent off."""
    for chunk in chunks:
        yield chunk, known.of(chunk.media_keys())


def _result(
    target: Path, rows: dict[str, int], drops: dict[str, int], facts: dict[str, Any], *, skipped: bool
) -> dict[str, Any]:
    return {
        "stage": "build-data",
        "target": str(target),
        "cached": skipped,
        "rows": rows,
        "read": facts["read"],
        "rejected": sum(drops.values()),
        "drops": drops,
        "leakage": facts["leakage"],
        "sources": facts["sources"],
        **{name: facts[name] for name in ("mixture", "exemplars") if name in facts},
    }
