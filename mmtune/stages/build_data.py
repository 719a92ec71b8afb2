"""build-data: raw sources to ``instructions/``.

One process reads the sources in order and cuts them into chunks of fixed size; workers probe
the media of a chunk and build its rows; the chunks are written in the order they were cut. So
the output does not depend on the number of workers.
"""

from __future__ import annotations

import os
import re
import signal
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmtune.errors import DataError, RecipeError, ResourceError
from mmtune.files import disk_errors, file_digest
from mmtune.media.known import KnownMedia, MediaPlace, MediumKey, Probe, Prober
from mmtune.media.paths import listing
from mmtune.media.probe import ProbeLimits
from mmtune.prompts.overlap import SplitOverlap, example_keys
from mmtune.prompts.schema import example_to_row, instructions_schema
from mmtune.prompts.template import make_example, template_names
from mmtune.readers import find_reader, modalities_of
from mmtune.readers.limit import cut, take
from mmtune.readers.repeated import SeenIds, drop_repeated
from mmtune.readers.source import SourceFiles
from mmtune.recipe import Recipe, Source
from mmtune.records import Example, Medium, Modality, Record, Reject
from mmtune.storage import RejectLog, SplitWriter, Staging, finish_split, open_stage, read_manifest, stage_hash
from mmtune.talk import Talk

SPLITS = ("train", "val", "test")
CHUNK_ROWS = 256
_INLINE_CHUNKS = 4
"""So many chunks are built before a pool is started: a small source does not pay for one."""
_ODD = re.compile("[\0\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")


@dataclass(frozen=True, slots=True)
class Settings:
    """What every worker needs."""

    seed: int
    templates: Any
    system: str
    limits: ProbeLimits


@dataclass(frozen=True, slots=True)
class Chunk:
    """A fixed number of items of one source."""

    source: int
    split: str
    template: str | None
    place: MediaPlace
    items: tuple[Record | Reject, ...]


@dataclass(frozen=True, slots=True)
class Built:
    """What became of a chunk."""

    source: int
    split: str
    batch: pa.RecordBatch
    keys: Any
    rejects: tuple[Reject, ...]
    probes: dict[MediumKey, Probe]
    odd: int
    tasks: Counter[str]


@dataclass(slots=True)
class Tally:
    """Counts of one source."""

    read: int = 0
    rows: int = 0
    tasks: Counter[str] = field(default_factory=Counter)


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
    files = [_check_source(source, recipe.seed) for source in recipe.sources]
    media_root, places = _places(recipe.sources, files, recipe.run_dir)
    target = recipe.run_dir / "instructions"
    if dry_run:
        return _dry_run(recipe, files, media_root, target, console)
    config = {
        "sources": [source.model_dump() for source in recipe.sources],
        "build": recipe.build.model_dump(exclude={"workers"}),
        "seed": recipe.seed,
        "limit": limit,
    }
    inputs = _inputs(recipe.sources, recipe.run_dir)
    staging = open_stage(target, stage="build-data", config=config, inputs=inputs, force=force)
    if staging is None:
        manifest = read_manifest(target, made_by="build-data")
        console.say(f"build-data: {target} is finished and up to date ({sum(manifest.rows.values()):,} rows)")
        return _result(target, manifest.rows, manifest.drops, manifest.facts, skipped=True)
    with staging, disk_errors(f"writing {target}"):
        for reason in staging.reasons:
            console.say(f"build-data: building again, {reason}")
        rows, drops, facts = _fill(staging, recipe, files, places, limit, console)
        facts = {"media_root": media_root, **facts}
        staging.publish(rows=rows, drops=drops, facts=facts)
    _say_result(recipe, rows, drops, facts, target, console)
    return _result(target, rows, drops, facts, skipped=False)


def _check_source(source: Source, seed: int) -> SourceFiles:
    find_reader(source.reader)
    if source.template is not None and source.template not in template_names():
        raise RecipeError(
            f"source {source.id!r} names the unknown template {source.template!r}",
            f"templates: {', '.join(sorted(template_names()))}",
            "unknown_template",
        )

    def path(value: str | None) -> Path | None:
        return Path(value) if value is not None else None

    for key in ("images", "audios", "videos"):
        folder = path(getattr(source, key))
        if folder is not None and not folder.is_dir():
            raise DataError(
                f"{folder} is no folder (`{key}` of source {source.id!r})",
                "check the path; a relative one is relative to the recipe's folder",
                "file_missing",
            )
    return SourceFiles(
        id=source.id,
        split=source.split,
        path=path(source.path),
        questions=path(source.questions),
        annotations=path(source.annotations),
        images=path(source.images),
        audios=path(source.audios),
        videos=path(source.videos),
        columns=source.columns,
        tasks=source.tasks,
        name=source.name,
        subset=source.subset,
        seed=seed,
    )


def _places(sources: tuple[Source, ...], files: list[SourceFiles], run_dir: Path) -> tuple[str, list[MediaPlace]]:
    """Returns the common parent of all media roots, and each source's place below it."""
    roots: list[dict[Modality, str]] = []
    for source, given in zip(sources, files, strict=True):
        hub = source.reader == "hf" and not (given.path and given.path.exists()) and given.images is None
        kinds = modalities_of(source.reader)
        roots.append({kind: os.path.realpath(run_dir if hub else given.root(kind)) for kind in kinds})
    top = os.path.commonpath([root for own in roots for root in own.values()])
    places = []
    for own in roots:
        prefixes = {kind: os.path.relpath(root, top).replace(os.sep, "/") for kind, root in own.items()}
        places.append(MediaPlace(own, {kind: "" if text == "." else f"{text}/" for kind, text in prefixes.items()}))
    return top, places


def _inputs(sources: tuple[Source, ...], run_dir: Path) -> dict[str, str]:
    """Returns digests of annotation files, and of the names and sizes below media folders."""
    found: dict[str, str] = {}
    for source in sources:
        for key in ("path", "questions", "annotations", "images", "audios", "videos"):
            value = getattr(source, key)
            if value is None or str(value) in found:
                continue
            path = Path(value)
            if path.is_file():
                found[str(path)] = file_digest(path)
            elif path.is_dir():
                found[str(path)] = stage_hash({"files": list(listing(path, run_dir))})
    return found


def _dry_run(recipe: Recipe, files: list[SourceFiles], media_root: str, target: Path, console: Talk) -> dict[str, Any]:
    seen = []
    for source, given in zip(recipe.sources, files, strict=True):
        first = next(iter(find_reader(source.reader)(given)), None)
        state = "no rows" if first is None else f"first item: {first.id}"
        if isinstance(first, Reject):
            state = f"first item refused: {first.reason} at {first.where}"
        console.say(f"build-data: would read {source.id} ({source.reader}, {source.split}); {state}")
        seen.append({"id": source.id, "split": source.split, "reader": source.reader, "first": state})
    console.say(f"build-data: would write {target}; media below {media_root}")
    return {"stage": "build-data", "target": str(target), "dry_run": True, "sources": seen, "media_root": media_root}


def _fill(
    staging: Staging,
    recipe: Recipe,
    files: list[SourceFiles],
    places: list[MediaPlace],
    limit: int | None,
    console: Talk,
) -> tuple[dict[str, int], dict[str, int], dict[str, Any]]:
    """Writes every split and the rejects; returns rows, drops and facts."""
    build, schema = recipe.build, instructions_schema()
    settings = Settings(
        seed=recipe.seed,
        templates=build.templates,
        system=build.system,
        limits=ProbeLimits(
            max_image_pixels=build.max_image_pixels,
            max_audio_seconds=build.max_audio_seconds,
            max_video_seconds=build.max_video_seconds,
            decode=build.verify == "decode",
            hash_bytes=build.hash_media,
            embed=build.media == "embed",
        ),
    )
    tallies = [Tally() for _ in files]
    writers: dict[str, SplitWriter] = {}
    overlap, odd = SplitOverlap(), 0
    chunks = _chunks(recipe, files, places, limit, tallies)
    with RejectLog(staging.path / "rejects.jsonl") as rejects, console.progress(None, "build-data") as bar:
        for built in _in_order(chunks, settings, _workers(build.workers)):
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
    return rows, drops, facts


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
    with open(log, encoding="utf-8") as handle:
        first = handle.readline().strip()[:400]
    listed = ", ".join(f"{reason} {count:,}" for reason, count in drops.items())
    if not rows:
        raise DataError(
            f"no row is left of {read:,}: {listed or 'the sources gave none'}; first: {first}",
            "mend the data or the paths; nothing was written",
            "no_rows",
        )
    if sum(drops.values()) > most * read:
        raise DataError(
            f"{sum(drops.values()):,} of {read:,} rows were refused, more than build.max_drop_fraction "
            f"({most:g}) allows: {listed}; first: {first}",
            "mend the data, or raise build.max_drop_fraction; nothing was written",
            "too_many_drops",
        )


def _chunks(
    recipe: Recipe, files: list[SourceFiles], places: list[MediaPlace], limit: int | None, tallies: list[Tally]
) -> Iterator[Chunk]:
    seen = SeenIds()
    for at, (source, given) in enumerate(zip(recipe.sources, files, strict=True)):
        read = find_reader(source.reader)
        caps = [cap for cap in (source.limit, limit) if cap is not None]
        items = take(lambda read=read, given=given: iter(read(given)), min(caps) if caps else None)  # type: ignore[misc]
        for part in cut(items, CHUNK_ROWS):
            tallies[at].read += len(part)
            checked = drop_repeated(part, seen, recipe.build.dedup)
            yield Chunk(at, source.split, source.template, places[at], checked)


def _workers(asked: Any) -> int:
    return min(8, len(os.sched_getaffinity(0))) if asked == "auto" else int(asked)


def _in_order(chunks: Iterator[Chunk], settings: Settings, workers: int) -> Iterator[Built]:
    """Yields built chunks in their order, at most a few of them in memory."""
    known = KnownMedia()
    few = chunks if workers == 1 else islice(chunks, _INLINE_CHUNKS)
    for chunk in few:
        built = build_chunk(chunk, known.of(_keys(chunk)), settings)
        known.add(built.probes)
        yield built
    following = next(chunks, None)
    if following is None:
        return
    waiting: deque[Future[Built]] = deque()
    # Not fork: the parent may hold threads (Arrow, a progress bar) that a forked child would lose.
    pool = ProcessPoolExecutor(workers, get_context("forkserver"), initializer=_quiet_child)
    try:
        for chunk in chain((following,), chunks):
            waiting.append(pool.submit(build_chunk, chunk, known.of(_keys(chunk)), settings))
            if len(waiting) > 2 * workers:
                built = waiting.popleft().result()
                known.add(built.probes)
                yield built
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ResourceError(
            "a worker process died, by lack of memory or by a damaged media file",
            "run again with build.workers: 1 to see at which row; nothing was written",
            "worker_died",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _keys(chunk: Chunk) -> Iterator[MediumKey]:
    return (chunk.place.key(medium) for item in chunk.items if isinstance(item, Record) for medium in _media(item))


def _quiet_child() -> None:
    # Ctrl-C reaches the whole group; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _media(record: Record) -> tuple[Medium, ...]:
    return record.media or tuple(medium for message in record.messages for medium in message.media)


def build_chunk(chunk: Chunk, known: dict[MediumKey, Probe], settings: Settings) -> Built:
    """Returns the rows of a chunk as an Arrow batch, with its rejects and newly probed media."""
    prober = Prober(chunk.place, settings.limits, known)
    rows, rejects, keys = [], [], []
    odd, tasks = 0, Counter[str]()
    for item in chunk.items:
        example = item if isinstance(item, Reject) else _example(item, chunk.template, prober, settings)
        if isinstance(example, Reject):
            rejects.append(example)
            continue
        rows.append(example_to_row(example))
        keys.append(example_keys(example))
        tasks[example.task] += 1
        odd += any(_ODD.search(message.text) is not None for message in example.messages)
    return Built(
        source=chunk.source,
        split=chunk.split,
        batch=pa.RecordBatch.from_pylist(rows, schema=instructions_schema()),
        keys=np.array(keys, np.uint64).reshape(-1, 2),
        rejects=tuple(rejects),
        probes=prober.fresh,
        odd=odd,
        tasks=tasks,
    )


def _example(record: Record, template: str | None, prober: Prober, settings: Settings) -> Example | Reject:
    found: dict[Medium, Medium] = {}
    for medium in _media(record):
        probe = prober.probe(medium)
        if isinstance(probe, tuple):
            return Reject(record.where, record.id, *probe)
        found[medium] = probe
    if found:
        messages = tuple(
            replace(message, parts=tuple(found[part] if isinstance(part, Medium) else part for part in message.parts))
            for message in record.messages
        )
        record = replace(record, media=tuple(found[medium] for medium in record.media), messages=messages)
    return make_example(
        record, seed=settings.seed, templates=settings.templates, template=template, system=settings.system
    )


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
    }


def _say_result(
    recipe: Recipe, rows: dict[str, int], drops: dict[str, int], facts: dict[str, Any], target: Path, console: Talk
) -> None:
    console.table(
        "build-data",
        ("source", "split", "reader", "read", "rows", "rejected"),
        [
            (fact["id"], fact["split"], fact["reader"], fact["read"], fact["rows"], fact["read"] - fact["rows"])
            for fact in facts["sources"]
        ],
    )
    for fact in facts["sources"]:
        if not fact["rows"]:
            console.note(f"source {fact['id']!r} ({fact['split']}) gave no row; see rejects.jsonl")
    if drops:
        listed = ", ".join(f"{reason} {count:,}" for reason, count in drops.items())
        refused = f"{sum(drops.values()):,} of {facts['read']:,} rows were refused: {listed}"
        console.note(f"{refused} ({target}/rejects.jsonl)")
    for pair, shared in facts["leakage"].items():
        console.note(f"{pair} share {shared['media']:,} media and {shared['questions']:,} questions on the same media")
    counts = ", ".join(f"{split} {count:,}" for split, count in rows.items())
    console.say(f"build-data: {counts} rows in {target}")
