"""Splits: the Arrow files of a dataset folder that ``datasets.load_from_disk`` opens."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.errors import DataError
from mmtune.files import file_digest

if TYPE_CHECKING:
    import pyarrow as pa


class SplitWriter:
    """One Arrow stream file of a split, written in batches of bounded size."""

    def __init__(self, path: Path, schema: pa.Schema, rows_per_batch: int = 1000) -> None:
        import pyarrow

        path.parent.mkdir(parents=True, exist_ok=True)
        self._schema = schema
        self._rows: list[dict[str, Any]] = []
        self._size = rows_per_batch
        self._arrow = pyarrow
        self._sink = pyarrow.OSFile(str(path), "wb")
        self._stream = pyarrow.ipc.new_stream(self._sink, schema)
        self.count = 0

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds one row."""
        self._rows.append(dict(row))
        self.count += 1
        if len(self._rows) >= self._size:
            self._flush()

    def write_batch(self, batch: pa.RecordBatch) -> None:
        """Adds a ready record batch of the same schema."""
        self._flush()
        self._stream.write_batch(batch)
        self.count += batch.num_rows

    def _flush(self) -> None:
        if self._rows:
            self._stream.write_batch(self._arrow.RecordBatch.from_pylist(self._rows, schema=self._schema))
            self._rows = []

    def close(self) -> int:
        """Ends the file; returns the number of rows in it."""
        self._flush()
        self._stream.close()
        self._sink.close()
        return self.count


def finish_split(folder: Path, schema: pa.Schema) -> int:
    """Names a split's ``*.arrow`` shards in order and makes it a ``load_from_disk`` folder.

    Shards are taken in the order of their file names. Returns the number of rows.
    """
    import datasets
    import pyarrow

    folder.mkdir(parents=True, exist_ok=True)
    shards = sorted(folder.glob("*.arrow"))
    if not shards:
        SplitWriter(folder / "shard-00000.arrow", schema).close()
        shards = sorted(folder.glob("*.arrow"))
    names = []
    for index, shard in enumerate(shards):
        name = f"data-{index:05d}-of-{len(shards):05d}.arrow"
        os.rename(shard, folder / name)
        names.append(name)
    rows = sum(_stream_table(folder / name).num_rows for name in names)
    digest = hashlib.sha256(b"".join(file_digest(folder / name).encode() for name in names)).hexdigest()
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": digest[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": folder.name,
    }
    features = datasets.Features.from_arrow_schema(pyarrow.schema(list(schema)))
    info = datasets.DatasetInfo(features=features)
    (folder / "state.json").write_text(json.dumps(state, indent=1), "utf-8")
    info.write_to_directory(str(folder))
    return rows


def _stream_table(path: Path) -> pa.Table:
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()


def open_split(folder: Path) -> pa.Table:
    """Returns a split as a memory-mapped table; its data pages are read on use.

    Raises:
        DataError: The split is not there.
    """
    import pyarrow

    shards = sorted(folder.glob("data-*.arrow"))
    if not shards:
        have = sorted(path.name for path in folder.parent.glob("*") if path.is_dir())
        raise DataError(
            f"{folder} is not there; splits found: {', '.join(have) or 'none'}",
            "check the `split` of the sources in the recipe",
            "split_missing",
        )
    return pyarrow.concat_tables([_stream_table(shard) for shard in shards])
