"""The features of one kind of unit: what is kept, what is made, and the table of both.

What is made goes into a journal, part by part; a part is named by what it is made of, so a run that is killed and
started again makes at most one part twice, with the same bytes.

Shapes: N tokens of a unit, D width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmtune.errors import DataError, IntegrityError
from mmtune.features.table import REDUCED, FeatureTable, Row, read_part, record_batch, vector_column, write_part
from mmtune.features.units import FeatureKind, Unit, by_length, todo
from mmtune.recipe import Extract
from mmtune.stages.extract.encoders import Chosen
from mmtune.stages.extract.preparing import Job, Prepared, Preparer, file_sha256
from mmtune.stages.extract.reducing import Reducer
from mmtune.storage import SplitWriter, finish_split, stage_hash
from mmtune.talk import Talk
from mmtune.workers import in_order, process_count

if TYPE_CHECKING:
    from mmtune.models.unimodal import Encoded, Unimodal

_PART_UNITS = 128
_PART_TEXTS = 2048
_ROWS_AT_ONCE = 1000
# So few batches are prepared here: starting processes would take longer than the work.
_INLINE_BATCHES = 6
_SLOW_IMPORTS = ("transformers.image_utils", "transformers.feature_extraction_utils", "torch")
_GONE = "not_finite"


@dataclass
class Filled:
    """What became of one kind of unit.

    Attributes:
        rows: Units with features.
        kept: Of them, those whose features were there already.
        resumed: Of them, those that a run made which did not end.
        changed: Units whose file was another when their earlier features were made.
        rejects: Units without features, as rows of ``rejects.jsonl``.
        seconds: What making took; 0 when nothing was made.
        starting_seconds: Of them, until the encoder was loaded and processes had begun.
        encoder_seconds: Of them, within the encoder.
        width: D.
        tokens: Tokens of all units.
        reduced: What their reduction is; None without one.
    """

    rows: int = 0
    kept: int = 0
    resumed: int = 0
    changed: int = 0
    rejects: tuple[dict[str, str], ...] = ()
    seconds: float = 0.0
    starting_seconds: float = 0.0
    encoder_seconds: float = 0.0
    width: int = 0
    tokens: int = 0
    reduced: dict[str, Any] | None = None


class Filler:
    """Makes the features of one kind.

    Args:
        kind: What the units are.
        chosen: Their encoder, its folder written.
        settings: The recipe's extract part.
        reducer: Shortens the pooled vectors, or None.
        media_root: The folder above all media.
        journal: Where parts stand until the table is complete.
        offline: Never reach for the network.
        console: Where progress goes.
    """

    def __init__(
        self,
        kind: FeatureKind,
        chosen: Chosen,
        path: str,
        settings: Extract,
        reducer: Reducer | None,
        *,
        media_root: str,
        journal: Path,
        offline: bool,
        console: Talk,
    ) -> None:
        self._kind, self._chosen, self._path, self._settings = kind, chosen, path, settings
        self._reducer = reducer
        self._root, self._journal, self._offline, self._console = media_root, journal / kind, offline, console
        self._dtype = settings.dtype if settings.tokens else None
        self._encoder: Unimodal | None = None
        self._ready = 0.0

    def fill(
        self, units: Sequence[Unit], splits: Mapping[str, Sequence[str]], old: FeatureTable | None, target: Path
    ) -> Filled:
        """Writes the table of the units' features into a folder; returns what became of them.

        Args:
            units: In the order of their first use, which is the order of the table.
            splits: A unit's id to its splits.
            old: Features of the same encoder that may still hold.
            target: The table's folder.

        Raises:
            DataError: A unit's features overflow fp16.
            IntegrityError: The encoder gives no numbers for any unit.
        """
        stands = {} if old is None else old.stands()
        missing, changed = todo(units, stands, partial(file_sha256, self._root))
        filled = Filled(changed=changed)
        parts = self._parts(by_length(missing))
        done = {name: found for name in parts if (found := read_part(self._part(name))) is not None}
        filled.resumed = sum(found[0].num_rows for found in done.values())
        wanted = {name: own for name, own in parts.items() if name not in done}
        if filled.resumed:
            self._console.say(f"extract: {self._kind}: going on after {filled.resumed:,} of {len(missing):,}")
        if wanted:
            self._make(wanted, splits, filled)
        tables = [FeatureTable(part[0]) for name in parts if (part := read_part(self._part(name))) and part[0].num_rows]
        filled.rejects = tuple(
            reject for name in parts if (part := read_part(self._part(name))) is not None for reject in part[1]
        )
        made = {unit.id for unit in missing}
        sources = [
            *([(old, {unit.id for unit in units} - made)] if old is not None else []),
            *((t, made) for t in tables),
        ]
        self._check_some(units, filled)
        filled.rows = self._write(units, splits, sources, target, filled)
        filled.kept = filled.rows - sum(len(table.ids) for table in tables)
        return filled

    def _check_some(self, units: Sequence[Unit], filled: Filled) -> None:
        """Raises IntegrityError where no unit has features, because the encoder gives no numbers."""
        if len(units) == len(filled.rejects) > 0 and all(reject["reason"] == _GONE for reject in filled.rejects):
            raise IntegrityError(
                f"the encoder of {self._kind}, {self._path}, gives no finite numbers for any of {len(units):,}:"
                " its weights are damaged",
                "fetch it again, or name another one in extract.encoders",
                _GONE,
            )

    def _parts(self, units: Sequence[Unit]) -> dict[str, list[list[Unit]]]:
        """Returns batches of units by the name of their part."""
        at_once = self._settings.batch_rows
        whole = _PART_TEXTS if self._kind in ("text", "behaviour") else _PART_UNITS
        whole = max(whole // at_once, 1) * at_once
        parts = {}
        for start in range(0, len(units), whole):
            own = units[start : start + whole]
            made_of = [self._chosen.fingerprint, [[unit.id, unit.size, unit.mtime_ns] for unit in own]]
            batches = [list(own[first : first + at_once]) for first in range(0, len(own), at_once)]
            parts[stage_hash({"part": made_of})[:32]] = batches
        return parts

    def _part(self, name: str) -> Path:
        return self._journal / f"{name}.arrow"

    def _make(self, parts: Mapping[str, list[list[Unit]]], splits: Mapping[str, Sequence[str]], filled: Filled) -> None:
        batches = [batch for own in parts.values() for batch in own]
        self._ready = started = time.monotonic()
        prepared = self._started(batches)
        with self._console.progress(sum(map(len, batches)), f"extract {self._kind}") as bar:
            for name, own in parts.items():
                rows: list[Row] = []
                rejects: list[dict[str, str]] = []
                for _ in own:
                    batch = next(prepared)
                    began = time.monotonic()
                    made, refused = self._encode(batch)
                    filled.encoder_seconds += time.monotonic() - began
                    rows += made
                    rejects += refused
                    bar.advance(len(batch))
                write_part(self._part(name), record_batch(rows, splits, self._dtype) if rows else None, rejects)
        filled.seconds, filled.starting_seconds = time.monotonic() - started, self._ready - started

    def _started(self, batches: list[list[Unit]]) -> Iterator[list[Prepared]]:
        """Yields prepared batches, the encoder loaded; processes start while it is."""
        prepared = self._prepared(batches)
        if self._processes(batches) == 1:
            self._encoder, self._ready = self._load(), time.monotonic()
            yield from prepared
            return
        with ThreadPoolExecutor(1) as beside:
            loading = beside.submit(self._load)
            first = next(prepared)
            self._encoder, self._ready = loading.result(), time.monotonic()
        yield first
        yield from prepared

    def _processes(self, batches: list[list[Unit]]) -> int:
        plain = self._kind in ("text", "behaviour") or len(batches) <= _INLINE_BATCHES
        return 1 if plain else process_count(self._settings.workers)

    def _load(self) -> Unimodal:
        import torch

        from mmtune.models.unimodal import load_unimodal

        chosen = self._chosen
        encoder = load_unimodal(
            self._path, chosen.encodes, pool=chosen.pool, revision=chosen.revision, offline=self._offline
        )
        if torch.cuda.is_available():
            encoder.model.to("cuda")
        return encoder

    def _prepared(self, batches: list[list[Unit]]) -> Iterator[list[Prepared]]:
        limits = {name: self._chosen.identity.get(name) for name in ("max_pixels", "max_seconds", "frames")}
        job = Job(self._chosen.encodes, self._path, self._chosen.revision, self._offline, self._root, limits)
        return in_order(
            partial(Preparer, job),
            batches,
            processes=self._processes(batches),
            inline=0,
            setting="extract.workers",
            preload=_SLOW_IMPORTS,
        )

    def _encode(self, batch: Sequence[Prepared]) -> tuple[list[Row], list[dict[str, str]]]:
        """Returns the rows of a batch, and what was refused, also by the encoder."""
        assert self._encoder is not None
        rejects = [one.reject for one in batch if one.reject is not None]
        good = [one for one in batch if one.reject is None]
        inputs = [own for one in good for own in one.inputs]
        made = self._encoder(inputs) if inputs else []
        rows, at = [], 0
        for one in good:
            row = self._row(one, made[at : at + len(one.inputs)])
            at += len(one.inputs)
            if np.isfinite(row.pooled).all():
                rows.append(row)
            else:
                detail = f"the encoder gives no finite numbers for {one.unit.id!r}"
                rejects.append({"where": one.unit.where, "id": one.unit.id, "reason": _GONE, "detail": detail})
        return rows, rejects

    def _row(self, one: Prepared, made: Sequence[Encoded]) -> Row:
        tokens, pooled = made[0].tokens, made[0].pooled
        if one.seconds:
            tokens, pooled = _clip(np.stack([frame.pooled for frame in made]), one.seconds)
        if self._dtype is None:
            return Row(one.unit, one.sha256, None, pooled)
        if self._dtype == "fp16":
            with np.errstate(over="ignore"):
                half = tokens.astype(np.float16)
            if not np.isfinite(half).all() and np.isfinite(tokens).all():
                raise DataError(
                    f"the features of {one.unit.id!r} reach {np.abs(tokens).max():.0f}, which fp16 cannot hold",
                    "run again with --set extract.dtype=fp32",
                    "overflow",
                )
            tokens = half
        return Row(one.unit, one.sha256, tokens, pooled)

    def _write(
        self,
        units: Sequence[Unit],
        splits: Mapping[str, Sequence[str]],
        sources: Sequence[tuple[FeatureTable, set[str]]],
        target: Path,
        filled: Filled,
    ) -> int:
        """Writes the rows of several tables in the order of the units; returns their number."""
        places: dict[str, tuple[int, int]] = {}
        for number, (table, ids) in enumerate(sources):
            places |= {name: (number, row) for row, name in enumerate(table.ids) if name in ids}
        found = [(unit, places[unit.id]) for unit in units if unit.id in places]
        if not found:
            return 0
        codes = self._codes(sources, found, splits, filled)
        writer: SplitWriter | None = None
        for start in range(0, len(found), _ROWS_AT_ONCE):
            own = found[start : start + _ROWS_AT_ONCE]
            some = pa.concat_tables(_runs(sources, [place for _, place in own]))
            some = _as_now(some, [unit for unit, _ in own], splits).combine_chunks()
            if codes is not None:
                some = some.append_column(REDUCED, vector_column(codes[start : start + len(own)]))
            if writer is None:
                writer = SplitWriter(target / "shard-00000.arrow", some.schema)
            for batch in some.to_batches():
                writer.write_batch(batch)
            filled.tokens += _count_tokens(some)
        assert writer is not None
        rows = writer.close()
        finish_split(target, some.schema)
        tokens = some.schema.field("tokens").type.value_type if self._dtype else None
        filled.width = (tokens or some.schema.field("pooled").type).list_size
        return rows

    def _codes(
        self,
        sources: Sequence[tuple[FeatureTable, set[str]]],
        found: Sequence[tuple[Unit, tuple[int, int]]],
        splits: Mapping[str, Sequence[str]],
        filled: Filled,
    ) -> NDArray[np.float32] | None:
        """Returns the reduced vectors of what is written, or None without a reduction."""
        if self._reducer is None:
            return None
        pooled = [table.pooled() for table, _ in sources]
        vectors = np.stack([pooled[number][row] for _, (number, row) in found])
        reduced = self._reducer.alone(self._kind, vectors, [splits[unit.id] for unit, _ in found])
        filled.reduced = reduced.facts
        return reduced.codes


def _clip(frames: NDArray[np.float32], seconds: Sequence[float]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns the tokens and the pooled vector of a video, as in ``clip_features``, told the seconds of its frames."""
    import torch

    from mmtune.features.frames import clip_features
    from mmtune.models.fusion.time_positions import time_waves

    return clip_features(frames, time_waves(torch.tensor(seconds), frames.shape[1]).numpy())


def _runs(sources: Sequence[tuple[FeatureTable, set[str]]], places: Sequence[tuple[int, int]]) -> Iterator[pa.Table]:
    """Yields slices of tables; neighbours that stay neighbours are taken together."""
    first, length = places[0], 0
    for place in places:
        if place == (first[0], first[1] + length):
            length += 1
            continue
        yield sources[first[0]][0].table.slice(first[1], length)
        first, length = place, 1
    yield sources[first[0]][0].table.slice(first[1], length)


def _as_now(table: pa.Table, units: Sequence[Unit], splits: Mapping[str, Sequence[str]]) -> pa.Table:
    """Returns rows with the splits and file times of this run, which kept ones may have from another."""
    now: dict[str, list[Any]] = {
        "splits": [list(splits[unit.id]) for unit in units],
        "mtime_ns": [unit.mtime_ns for unit in units],
    }
    for name, values in now.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    return table


def _count_tokens(table: pa.Table) -> int:
    if "tokens" not in table.column_names:
        return 0
    return sum(len(chunk.flatten()) for chunk in table.column("tokens").chunks)
