"""tokenize: instructions/ to tokens/. Wiring only; the encoding itself is in ``encoding``."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmtune.choice import chosen
from mmtune.encoding.encoded import LEFT_OUT, Encoded
from mmtune.encoding.fit import fit
from mmtune.encoding.groups import EncodedGroups, encode_groups, group_order
from mmtune.encoding.histories import history_counts
from mmtune.encoding.media_check import check_counts
from mmtune.encoding.processor import check_folder, load_processor, pad_token_id, processor_fingerprint
from mmtune.encoding.processor_files import files_digest
from mmtune.encoding.refused import Refused
from mmtune.encoding.render import IGNORED, EncodedRow, Renderer
from mmtune.encoding.tree import TREE_SCHEMA
from mmtune.errors import DataError, RecipeError
from mmtune.prompts.delimiters import DELIMITERS, joined
from mmtune.prompts.exemplars import Order, shown_ranks
from mmtune.prompts.schema import COLUMN, row_to_messages
from mmtune.prompts.searched import context_of
from mmtune.prompts.wordings import WORDINGS
from mmtune.recipe import Recipe, Tokenize
from mmtune.records import Medium
from mmtune.storage import (
    Manifest,
    RejectLog,
    SplitWriter,
    Staging,
    finish_split,
    foresee,
    is_finished,
    library_versions,
    open_split,
    open_stage,
    read_manifest,
)
from mmtune.talk import Talk, counted
from mmtune.workers import in_order, process_count

# Groups per unit of work: large enough to keep a process busy, small enough to hold in memory.
_UNIT = 512
# So few units are encoded here: starting processes would take longer than the work.
_INLINE_UNITS = 12
# What loading a processor imports for seconds.
_SLOW_IMPORTS = ("transformers.processing_utils", "transformers.models.auto.processing_auto")
# Encoding reads these columns; the others (answers to score against, lineage) stay on disk.
_READ = ("id", "messages", *COLUMN.values(), "tools", "exemplar_ids", "references", "metadata")


@dataclass(frozen=True)
class _Job:
    """What a worker process needs to encode a range of groups."""

    model: str
    revision: str | None
    offline: bool
    settings: Tokenize
    split: Path
    media_root: Path
    order: Order = "nearest_first"
    seed: int = 0


def check_model(recipe: Recipe) -> None:
    """Raises RecipeError where the model is a folder that is not there."""
    check_folder(recipe.processor_path)


def tokenize(
    recipe: Recipe,
    *,
    force: bool = False,
    dry_run: bool = False,
    limit: int | None = None,
    offline: bool = False,
    console: Talk,
) -> dict[str, Any]:
    """Encodes every split of instructions/ and writes tokens/; returns the result document.

    Raises:
        DataError: instructions/ is missing, or no row could be encoded.
        RecipeError: The recipe names no model, or its tokenizer cannot be used.
    """
    if recipe.model is None:
        raise RecipeError("the recipe names no model", "add `model: {path: ...}`")
    parent = read_manifest(recipe.run_dir / "instructions", made_by="build-data")
    settings, target = recipe.tokenize, recipe.run_dir / "tokens"
    files = _files_of(recipe)
    config = {
        "tokenize": settings.model_dump(mode="json", exclude={"workers"}),
        "model": recipe.model.path,
        "processor": (None if force else _known(target, files)) or _fingerprint(recipe, offline),
        "limit": limit,
    }
    parents = {"instructions": parent.hash_without(WORDINGS)}
    if dry_run:
        console.say(foresee(target, stage="tokenize", config=config, parents=parents, force=force))
        return {"stage": "tokenize", "dry_run": True, "target": str(target), "rows": parent.rows, "config": config}
    staging = open_stage(target, stage="tokenize", config=config, parents=parents, force=force, say=console.say)
    if staging is None:
        return _result(target, read_manifest(target), cached=True)
    with staging:
        return _write(recipe, parent, {**config, "files": files}, staging, limit, offline, console)


def _files_of(recipe: Recipe) -> str | None:
    """Returns what changes when the processor may: its files, its pixel budget, the libraries that read them."""
    budget = (recipe.tokenize.min_image_pixels, recipe.tokenize.max_image_pixels)
    return files_digest(Path(recipe.processor_path), {"pixels": budget, "versions": library_versions()})


def _known(target: Path, files: str | None) -> str | None:
    """Returns the fingerprint of the processor that finished tokens/ were made by, if its files are still the same."""
    if files is None or not is_finished(target):
        return None
    made = read_manifest(target)
    return str(made.config["processor"]) if made.facts.get("processor_files") == files else None


def _fingerprint(recipe: Recipe, offline: bool) -> str:
    revision = recipe.model.revision if recipe.model else None
    processor = _processor(_Job(recipe.processor_path, revision, offline, recipe.tokenize, Path(), Path()))
    pad_token_id(processor)
    return processor_fingerprint(processor)


def _processor(job: _Job) -> Any:
    return load_processor(
        job.model,
        revision=job.revision,
        offline=job.offline,
        min_image_pixels=job.settings.min_image_pixels,
        max_image_pixels=job.settings.max_image_pixels,
    )


def _write(
    recipe: Recipe,
    parent: Manifest,
    config: dict[str, Any],
    staging: Staging,
    limit: int | None,
    offline: bool,
    console: Talk,
) -> dict[str, Any]:
    made, started = Encoded(), time.monotonic()
    with RejectLog(staging.path / "rejects.jsonl") as rejects:
        for split, count in parent.rows.items():
            with console.progress(count, f"tokenize {split}") as bar:
                groups = _encode_split(_job_of(recipe, parent, split, offline), limit)
                _write_split(split, groups, staging.path / split, made, rejects, bar.advance)
    if not sum(made.examples.values()):
        none = f"no row could be encoded: {_drops(rejects.counts)}"
        raise DataError(none, _next_step(rejects.counts, recipe), "no_rows")
    seconds = time.monotonic() - started
    facts = {
        "model": config["model"],
        "processor": config["processor"],
        "processor_files": config["files"],
        "max_length": recipe.tokenize.max_length,
        "video_frames": recipe.tokenize.video_frames,
        "media_root": parent.facts["media_root"],
        **made.facts(),
    }
    for note in made.notes:
        console.note(note)
    timings = {"encode_seconds": round(seconds, 3)}
    manifest = staging.publish(rows=made.trees, drops=rejects.counts, facts=facts, timings=timings)
    count = _tell(made, rejects.counts, seconds, console)
    if rejects.counts:
        mend = f"{_next_step(rejects.counts, recipe)} ({staging.target / 'rejects.jsonl'})"
        of = f"{sum(rejects.counts.values()):,} of {counted(count, 'row')}"
        console.note(f"tokenize refused {of}: {_drops(rejects.counts)}; {mend}")
    return _result(staging.target, manifest, cached=False)


def _job_of(recipe: Recipe, parent: Manifest, split: str, offline: bool) -> _Job:
    assert recipe.model is not None
    return _Job(
        recipe.processor_path,
        recipe.model.revision,
        offline,
        recipe.tokenize,
        recipe.run_dir / "instructions" / split,
        Path(parent.facts["media_root"]),
        parent.facts.get("exemplars", {}).get("order", "nearest_first"),
        parent.config.get("seed", 0),
    )


def _write_split(
    split: str,
    groups: Iterator[EncodedGroups],
    folder: Path,
    made: Encoded,
    rejects: RejectLog,
    advance: Callable[[int], None],
) -> None:
    """Writes the trees of a split, and adds what became of its rows to what was made."""
    writer = SplitWriter(folder / "shard-00000.arrow", TREE_SCHEMA)
    made.examples[split] = 0
    for done in groups:
        if done.batch is not None:
            writer.write_batch(done.batch)
        for reject in done.rejects:
            rejects.write(reject)
        made.add(split, done)
        advance(done.rows + len(done.rejects))
    made.trees[split] = writer.close()
    finish_split(folder, TREE_SCHEMA)


def _tell(made: Encoded, refused: Mapping[str, int], seconds: float, console: Talk) -> int:
    """Says what was encoded; returns how many rows there were, refused ones included."""
    encoded = sum(made.examples.values())
    count = encoded + sum(refused.values())
    saved = 1 - made.tokens / max(made.tokens_apart, 1)
    console.say(
        f"tokenize: {counted(encoded, 'row')} in {counted(sum(made.trees.values()), 'tree')}"
        f", {counted(made.tokens, 'token')}{f' ({saved:.0%} saved by sharing)' if saved >= 0.005 else ''}"
        f", {count / max(seconds, 1e-9):,.0f} rows/s"
    )
    for note in _left_out(made.counts):
        console.note(note)
    return count


def _left_out(counts: Counter[str]) -> Iterator[str]:
    """Yields what there is to say of what was left out of the rows."""
    dropped, fewer, shortened = (counts[name] for name in LEFT_OUT)
    if dropped:
        yield (
            f"{counted(dropped, 'exemplar')} of {counted(fewer, 'row')} did not fit tokenize.max_length;"
            " the farthest were left out"
        )
    if shortened:
        yield f"the contexts of {counted(shortened, 'row')} were cut to fit tokenize.max_length"
    if counts["histories_shortened"]:
        yield f"histories of which the newest items alone are read: {counts['histories_shortened']:,}"
    if counts["items_unknown"]:
        yield (
            f"{counts['items_unknown']:,} of {counted(counts['items_read'], 'item')} in histories are unknown to the"
            " model, and told as such"
        )


def _next_step(refused: Iterable[str], recipe: Recipe) -> str:
    """Returns what may help where rows were refused, by the reasons."""
    steps = []
    if {"too_long", "media_too_long", "answer_cut"} & set(refused):
        steps.append(f"a tokenize.max_length above {recipe.tokenize.max_length} may help, or tokenize.too_long")
    if "modality_unsupported" in refused and recipe.model is not None:
        steps.append(f"{recipe.model.path} reads no such media: name a `model` that does, or leave these sources out")
    return "; ".join(steps) or "look at the reasons"


def _drops(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items()))


def _result(target: Path, manifest: Manifest, *, cached: bool) -> dict[str, Any]:
    return {
        "stage": "tokenize",
        "cached": cached,
        "target": str(target),
        "trees": manifest.rows,
        "rows": manifest.facts.get("examples", {}),
        "drops": manifest.drops,
        "tokens": manifest.facts.get("tokens"),
    }


def _encode_split(job: _Job, limit: int | None) -> Iterator[EncodedGroups]:
    table = open_split(job.split)
    numbers = np.arange(table.num_rows)
    if limit is not None and limit < numbers.size:
        numbers = np.asarray(chosen(_values(table, "id"), limit, "tokenize.limit"))
    if job.settings.layout == "rows":
        order, starts = numbers, np.arange(numbers.size + 1)
    else:
        asked = np.zeros(table.num_rows, dtype=bool)
        asked[numbers] = True
        order, starts = group_order(compress(_values(table, "group"), asked), numbers.size)
        order = numbers[order]
    units = []
    for begin in range(0, len(starts) - 1, _UNIT):
        edges = starts[begin : begin + _UNIT + 1]
        units.append((order[edges[0] : edges[-1]], edges - edges[0]))
    return in_order(
        partial(_Encoder, job),
        units,
        processes=process_count(job.settings.workers),
        inline=len(units) if len(units) <= _INLINE_UNITS else 0,
        setting="tokenize.workers",
        preload=_SLOW_IMPORTS,
    )


def _values(table: pa.Table, name: str) -> Iterator[str]:
    for chunk in table.column(name).chunks:
        yield from (value or "" for value in chunk.to_pylist())


def _rows(table: pa.Table, numbers: np.ndarray) -> list[dict[str, Any]]:
    """Returns some rows by slices; ``take`` would copy whole chunks of a long table."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    runs = np.split(numbers, breaks)
    return pa.concat_tables([table.slice(int(run[0]), len(run)) for run in runs]).to_pylist()


def _first_media(table: pa.Table, rows: int = 64) -> Iterator[Medium]:
    """Yields the media of the first rows of a split."""
    for row in table.slice(0, rows).to_pylist():
        for message in row_to_messages(row):
            yield from message.media


class _Encoder:
    """Encodes units of groups with its own processor and its own view of the table."""

    def __init__(self, job: _Job) -> None:
        self._job, self._counts = job, Counter[str]()
        self._max_length = job.settings.max_length
        self._drop_turns = job.settings.too_long == "drop_turns"
        self._shorten = job.settings.too_long == "shorten"
        self._processor = processor = _processor(job)
        self._renderer = Renderer(processor, video_frames=job.settings.video_frames)
        table = open_split(job.split)
        # Rows that were built before histories were media have no column of them.
        self._table = table.select([name for name in _READ if name in table.column_names])
        # Every process looks at the same few files, so all come to the same rule.
        check_counts(self._renderer.counter, processor, job.media_root, _first_media(self._table))

    def __call__(self, unit: tuple[np.ndarray, np.ndarray]) -> EncodedGroups:
        """Encodes the groups of one unit, in order."""
        numbers, starts = unit
        rows = _rows(self._table, numbers)
        self._counts = Counter()
        done = encode_groups(rows, starts, self._encode, self._max_length, self._renderer.counter.notes)
        return replace(done, counts=self._counts)

    def _encode(self, row: Mapping[str, Any]) -> EncodedRow:
        messages = row_to_messages(row)
        ranks = shown_ranks(self._job.order, len(row["exemplar_ids"]), f"{self._job.seed}\0{row['id']}")
        metadata = json.loads(row["metadata"])
        context = context_of(metadata) if self._shorten else ""
        fitted = fit(
            self._renderer,
            messages,
            row["tools"],
            self._max_length,
            drop_turns=self._drop_turns,
            ranks=ranks,
            context=context,
            shown=lambda turns: joined(turns, metadata.get(DELIMITERS)),
        )
        if fitted.context is not None and cut_away(row["references"], context, fitted.context):
            raise Refused("answer_cut", f"its answer stands in what tokenize.max_length ({self._max_length}) cuts off")
        if not (fitted.row.labels != IGNORED).any():
            raise Refused("no_target", "no token of this row bears loss")
        lost = (fitted.dropped, fitted.dropped > 0, fitted.context is not None)
        self._counts.update(dict(zip(LEFT_OUT, map(int, lost), strict=True)))
        self._counts.update(history_counts(self._processor, fitted.row.media))
        return fitted.row


def cut_away(references: Sequence[str], context: str, left: str) -> bool:
    """Says whether a context named a right answer and what is left of it names none.

    Args:
        references: Right answers.
        context: The whole of it.
        left: Its first words, one blank between them.
    """
    whole, rest = (" ".join(text.split()).casefold() for text in (context, left))
    named = [answer for answer in (" ".join(one.split()).casefold() for one in references) if answer in whole]
    return bool(named) and not any(answer in rest for answer in named)
