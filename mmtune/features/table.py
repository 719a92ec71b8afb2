"""Features on disk: one Arrow table per kind, which ``datasets.load_from_disk`` opens.

Columns: ``id``, ``modality``, ``path``, ``text``, ``splits``, ``size``, ``mtime_ns``, ``sha256``, ``tokens`` (a list of
rows of one width, float16 or float32; left out where only vectors are kept), ``pooled`` (float32) and, with a
reduction, ``reduced`` (float32).

Shapes: N tokens of one unit, D width, V width of the pooled vector, C width of the reduced one, R rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmtune.errors import DataError, IntegrityError
from mmtune.features.units import Unit
from mmtune.files import sync

if TYPE_CHECKING:
    import pyarrow as pa

REDUCED = "reduced"
"""The column of reduced vectors."""
_REJECTS = b"mmtune.rejects"
_FACTS = ("id", "modality", "path", "text", "splits", "size", "mtime_ns", "sha256")


@dataclass(frozen=True)
class Row:
    """The features of one unit, ready to be written.

    Attributes:
        unit: Of what.
        sha256: Of the file's or text's bytes.
        tokens: ``(N, D)``, or None where only the vector is kept.
        pooled: ``(V,)`` float32.
    """

    unit: Unit
    sha256: str
    tokens: NDArray[np.floating] | None
    pooled: NDArray[np.float32]


def feature_schema(width: int, pooled: int, dtype: str | None) -> pa.Schema:
    """Returns the schema of features of one width.

    Args:
        width: D.
        pooled: V.
        dtype: ``fp16`` or ``fp32``; None leaves the tokens out.
    """
    import pyarrow as pa

    text = pa.string()
    types = {"splits": pa.list_(text), "size": pa.int64(), "mtime_ns": pa.int64()}
    fields = [(name, types.get(name, text)) for name in _FACTS]
    if dtype is not None:
        number = {"fp16": pa.float16(), "fp32": pa.float32()}[dtype]
        fields.append(("tokens", pa.list_(pa.list_(number, width))))
    return pa.schema([*fields, ("pooled", pa.list_(pa.float32(), pooled))])


def record_batch(rows: Sequence[Row], splits: Mapping[str, Sequence[str]], dtype: str | None) -> pa.RecordBatch:
    """Returns rows as one Arrow batch.

    Args:
        rows: At least one.
        splits: A unit's id to its splits.
        dtype: As in ``feature_schema``.
    """
    import pyarrow as pa

    first = rows[0]
    width = 0 if first.tokens is None else first.tokens.shape[1]
    schema = feature_schema(width, len(first.pooled), dtype)
    facts = [_facts(row, splits) for row in rows]
    columns: list[Any] = [pa.array([fact[name] for fact in facts], schema.field(name).type) for name in _FACTS]
    if dtype is not None:
        held = [row.tokens for row in rows if row.tokens is not None]
        number = {"fp16": np.float16, "fp32": np.float32}[dtype]
        edges = np.cumsum([0, *(len(tokens) for tokens in held)]).astype(np.int32)
        flat = pa.array(np.concatenate(held).astype(number, copy=False).reshape(-1))
        columns.append(pa.ListArray.from_arrays(edges, pa.FixedSizeListArray.from_arrays(flat, width)))
    columns.append(vector_column(np.stack([row.pooled for row in rows])))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def vector_column(vectors: NDArray[np.floating]) -> pa.FixedSizeListArray:
    """Returns vectors ``(R, V)`` as a column of float32."""
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def _facts(row: Row, splits: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    unit = row.unit
    text = "\n".join(unit.items) if unit.kind == "behaviour" else unit.text
    path = unit.medium.path if unit.medium is not None else ""
    known = (unit.id, unit.kind, path, text, list(splits[unit.id]), unit.size, unit.mtime_ns, row.sha256)
    return dict(zip(_FACTS, known, strict=True))


def write_part(path: Path, batch: pa.RecordBatch | None, rejects: Sequence[Mapping[str, str]]) -> None:
    """Writes a part of the journal aside, syncs it and renames it into its place.

    Args:
        path: Its file.
        batch: Its rows; None where all were refused.
        rejects: What was refused.
    """
    import pyarrow as pa

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    schema = (batch.schema if batch is not None else pa.schema([])).with_metadata({_REJECTS: json.dumps(list(rejects))})
    try:
        with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
            if batch is not None:
                stream.write_batch(batch.replace_schema_metadata(schema.metadata))
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def read_part(path: Path) -> tuple[pa.Table, list[dict[str, str]]] | None:
    """Returns rows and rejects of a part of the journal; None where it is absent or damaged."""
    import pyarrow as pa

    try:
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowException):
        return None
    rejects = (table.schema.metadata or {}).get(_REJECTS)
    return None if rejects is None else (table.replace_schema_metadata(None), json.loads(rejects))


class FeatureTable:
    """The features of one kind; tokens are read on use.

    Attributes:
        table: The Arrow table.
        ids: The units' ids, by row.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.ids: list[str] = table.column("id").to_pylist()
        self._rows = {name: row for row, name in enumerate(self.ids)}

    def row_of(self, unit_id: str) -> int | None:
        """Returns the row of a unit, or None where it has no features; see ``units.text_id`` for texts."""
        return self._rows.get(unit_id)

    def pooled(self) -> NDArray[np.float32]:
        """Returns all pooled vectors, ``(R, V)``."""
        return self._vectors("pooled")

    def compared(self) -> NDArray[np.float32]:
        """Returns the vectors that rows are compared by: the reduced ones ``(R, C)`` if there are, else the pooled."""
        return self._vectors(REDUCED if REDUCED in self.table.column_names else "pooled")

    def not_reduced(self) -> FeatureTable:
        """Returns the same features without the column of reduced vectors."""
        names = [name for name in self.table.column_names if name != REDUCED]
        return FeatureTable(self.table.select(names))

    def _vectors(self, name: str) -> NDArray[np.float32]:
        column = self.table.column(name)
        parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
        return np.concatenate([np.empty(0, np.float32), *parts]).reshape(-1, column.type.list_size)

    def tokens(self, row: int) -> NDArray[np.floating]:
        """Returns the tokens of a row, ``(N, D)``.

        Raises:
            DataError: Only vectors were kept.
        """
        if "tokens" not in self.table.column_names:
            raise DataError("these features hold no tokens", "set extract.tokens: true and extract again", "no_tokens")
        value = self.table.column("tokens")[row].values
        return value.flatten().to_numpy(zero_copy_only=False).reshape(-1, value.type.list_size)

    def stands(self) -> dict[str, tuple[int, int, str]]:
        """Returns id to size, time and sha256 of the file it was made from."""
        columns = (self.table.column(name).to_pylist() for name in ("id", "size", "mtime_ns", "sha256"))
        return {name: (size, mtime, sha) for name, size, mtime, sha in zip(*columns, strict=True)}


def open_features(folder: Path, kind: str) -> FeatureTable:
    """Returns the features of one kind in a features folder.

    Raises:
        DataError: There are none.
        IntegrityError: A file is damaged.
    """
    import pyarrow as pa

    files = sorted((folder / kind).glob("data-*.arrow"))
    if not files:
        raise DataError(f"{folder} holds no features of {kind}", "run: mmtune extract", "features_missing")
    try:
        return FeatureTable(
            pa.concat_tables([pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in files])
        )
    except (OSError, pa.ArrowException) as error:
        raise IntegrityError(f"the features in {folder / kind} are damaged", "run: mmtune extract --force") from error
