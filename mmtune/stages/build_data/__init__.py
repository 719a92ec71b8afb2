"""build-data: raw sources to ``instructions/``.

One process reads the sources in order and cuts them into chunks of fixed size; workers probe
the media of a chunk and build its rows; the chunks are written in the order they were cut. So
the output does not depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmtune.errors import RecipeError
from mmtune.features.units import known_as
from mmtune.files import file_digest
from mmtune.media.content import names_beside
from mmtune.media.known import KnownMedia, MediaPlace, MediumKey, Probe, media_places
from mmtune.media.paths import listing
from mmtune.media.probe import ProbeLimits
from mmtune.prompts.chunk import Asked, Built, Chunk, ChunkBuilder
from mmtune.prompts.searched import SearchedPrompt
from mmtune.prompts.wordings import WORDINGS
from mmtune.readers import find_reader
from mmtune.readers.limit import cut, part, take
from mmtune.readers.repeated import SeenIds, drop_repeated
from mmtune.readers.roots import PATHS, files_of, media_roots
from mmtune.readers.source import SourceFiles
from mmtune.recipe import Build, Recipe
from mmtune.records import Record, Reject
from mmtune.stages.build_data.asking import all_asked, further_wordings, named, template_file
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
from mmtune.stages.build_data.splits import Splits
from mmtune.stages.build_data.tally import Tally, check_drops, train_asked, train_rows
from mmtune.storage import (
    Manifest,
    RejectLog,
    Staging,
    foresee,
    open_stage,
    read_manifest,
    stage_hash,
)
from mmtune.talk import Talk
from mmtune.workers import in_order, process_count

CHUNK_ROWS = 256
_INLINE_CHUNKS = 4
_MOST_PROCESSES = 8
"""One process reads for all; more than this would wait for it."""


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
    asked, further = all_asked(recipe), further_wordings(recipe)
    keep = [template_file(source, recipe.build) is not None for source in recipe.sources]
    files = files_of([source.model_dump() for source in recipe.sources], recipe.seed, keep)
    roots = [
        media_roots(source.reader, given, recipe.run_dir) for source, given in zip(recipe.sources, files, strict=True)
    ]
    given = given_prompt(recipe)
    media_root, places = media_places([*roots, *prompt_roots(given)])
    target, slots = recipe.run_dir / "instructions", keeps_slots(recipe)
    config = {
        "sources": [source.model_dump(exclude=set() if source.where else {"where"}) for source in recipe.sources],
        "build": recipe.build.model_dump(exclude={"workers"}),
        "seed": recipe.seed,
        "limit": limit,
        **({"slots": True} if slots else {}),
        **({WORDINGS: further if further == "all" else list(further)} if further else {}),
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
    with staging:
        searched = placed(given, media_root)
        sources = _Sources(recipe, files, asked, places, media_root, features, limit, searched, slots)
        rows, drops, facts = _fill(staging, recipe, sources, console)
        facts = {"media_root": media_root, **facts}
        staging.publish(rows=rows, drops=drops, facts=facts)
    say_result(rows, drops, facts, target, console, recipe)
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
    tallies, splits, known = [Tally(source) for source in recipe.sources], Splits(staging.path), KnownMedia()
    mixed = _mix(recipe, sources, console)
    if mixed is not None:
        check_prompt(sources.prompt, mixed.held_out)
    shown, log = _exemplars(recipe, sources, mixed), staging.path / "rejects.jsonl"
    work = _work(shown.attach(_chunks(sources, mixed, tallies)), known)
    with RejectLog(log) as rejects, console.progress(None, "build-data") as bar:
        for built in _built(recipe, sources, shown, work):
            known.add(built.probes)
            for reject in built.rejects:
                rejects.write(reject)
            splits.add(built)
            tallies[built.source].add(built)
            bar.advance(built.batch.num_rows + len(built.rejects))
        drops = dict(sorted(rejects.counts.items()))
    rows = splits.close()
    check_drops(tallies, drops, recipe.build.max_drop_fraction, log)
    splits.finish()
    return rows, drops, {**_counted(tallies), **splits.facts(), **_drawn(tallies, mixed, shown)}


def _built(
    recipe: Recipe, sources: _Sources, shown: Shown, work: Iterator[tuple[Chunk, Mapping[MediumKey, Probe]]]
) -> Iterator[Built]:
    """Yields what becomes of each chunk, in the order they were cut."""
    build, prompt = recipe.build, sources.prompt
    builder = partial(
        ChunkBuilder,
        recipe.seed,
        sources.asked,
        build.system,
        _limits(build),
        shown.shares,
        shown.choose,
        shown.order,
        known_as,
        prompt,
        sources.slots,
        names_beside(sources.media_root, () if prompt is None else prompt.media),
    )
    processes = process_count(build.workers)
    return in_order(
        builder,
        work,
        processes=min(processes, _MOST_PROCESSES) if build.workers == "auto" else processes,
        inline=_INLINE_CHUNKS,
        setting="build.workers",
    )


def _counted(tallies: list[Tally]) -> dict[str, Any]:
    return {"sources": [tally.facts() for tally in tallies], "read": sum(tally.read for tally in tallies)}


def _drawn(tallies: list[Tally], mixed: Mixed | None, shown: Shown) -> dict[str, Any]:
    """Returns the facts of the mixture and of the exemplars, where the recipe has them."""
    facts, asked = dict[str, Any](), train_asked(tallies)
    if mixed is not None:
        rows = {name: count for name, count in train_rows(tallies).items() if name in mixed.quotas}
        facts["mixture"] = mixed.facts(rows, asked)
    if shown.shares is not None and shown.shares.shots:
        facts["exemplars"] = shown.facts(asked)
    return facts


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


def _limits(build: Build) -> ProbeLimits:
    return ProbeLimits(
        max_image_pixels=build.max_image_pixels,
        max_audio_seconds=build.max_audio_seconds,
        max_video_seconds=build.max_video_seconds,
        decode=build.verify == "decode",
        hash_bytes=build.hash_media,
        embed=build.media == "embed",
    )


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
