"""The rows of a table file of any format: CSV, TSV, JSONL, JSON, Parquet and plain text lines."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtune.errors import DataError
from mmtune.readers.source import Row, SourceFiles
from mmtune.readers.strict_json import iter_jsonl, iter_lines, open_bytes, stream_arrays
from mmtune.records import Reject

SLOT = re.compile(r"\{([^{}]+)\}")
"""A column in a template of ``columns``."""
_NO_COLUMN = ("rows", "delimiter", "strip")
"""Names in ``columns`` that stand for no column."""
_MAX_FIELD = 64 << 20
_BINARY = re.compile("[\0-\x08\x0e-\x1f\ud800-\udfff]")


def as_sequence(value: Any) -> Sequence[Any]:
    """Returns a list of columns as it is, and one column as a list."""
    return value if isinstance(value, list | tuple) else [value]


def table_rows(source: SourceFiles, path: Path) -> Iterator[Row | Reject]:
    """Yields the rows of a file, whose name says what it is: mappings, or what JSON holds in their place.

    Raises:
        DataError: The file is damaged, or has not the columns that are read.
    """
    name = path.name.removesuffix(".gz").lower()
    if name.endswith((".jsonl", ".ndjson")):
        return iter_jsonl(path)
    if name.endswith(".json"):
        return _json_rows(source, path)
    if name.endswith(".parquet"):
        return _parquet_rows(path, source)
    if name.endswith(".txt") and "delimiter" not in source.columns:
        return _text_rows(path)
    delimiter = str(source.columns.get("delimiter", "\t" if name.endswith(".tsv") else ","))
    return _csv_rows(path, delimiter, source)


def _json_rows(source: SourceFiles, path: Path) -> Iterator[Row | Reject]:
    array = str(source.columns.get("rows", ""))
    for key, row in stream_arrays(path, (array,)):
        if key == array:
            yield row
        elif not array and isinstance(row, Row):
            value = {"key": key, **row.value} if isinstance(row.value, Mapping) else row.value
            yield Row(row.where, row.index, value)
        elif not array:
            yield row


def _text_rows(path: Path) -> Iterator[Row | Reject]:
    for index, (number, line) in enumerate(iter_lines(path)):
        yield line if isinstance(line, Reject) else Row(f"{path.name}:{number}", index, {"text": line})


def _csv_rows(path: Path, delimiter: str, source: SourceFiles) -> Iterator[Row | Reject]:
    csv.field_size_limit(min(_MAX_FIELD, sys.maxsize))
    with open_bytes(path) as handle:
        # A byte that is not UTF-8 becomes a lone surrogate, so that only its own row is refused.
        text = io.TextIOWrapper(handle, "utf-8-sig", errors="surrogateescape", newline="")
        lines = csv.reader(text, delimiter=delimiter, strict=True)
        head: list[str] | None = None
        index = -1
        while True:
            try:
                cells = next(lines, None)
            except csv.Error as error:
                index += 1
                yield Reject(f"{path.name}:{lines.line_num}", "", "bad_row", f"not valid CSV: {error}")
                continue
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise DataError(f"{path} is cut or damaged (gzip)", "fetch it again", "bad_gzip") from error
            if cells is None:
                return
            if not any(cell.strip() for cell in cells):
                continue
            if head is None:
                head = [name.strip() for name in cells]
                _check_head(head, source, path)
                continue
            index += 1
            yield _csv_row(head, cells, f"{path.name}:{lines.line_num}", index)


def _check_head(head: list[str], source: SourceFiles, path: Path) -> None:
    if any(_BINARY.search(name) for name in head):
        raise DataError(
            f"{path} begins with no line of column names; it is no UTF-8 text table",
            "by its name a file is read as .csv, .tsv, .jsonl, .json, .txt (each also .gz) or .parquet",
            "bad_table",
        )
    _check_twice(head, source, path)
    for name, spec in source.columns.items():
        if name in _NO_COLUMN:
            continue
        for one in as_sequence(spec):
            plain = isinstance(one, str) and not one.startswith("=") and "{" not in one
            if plain and one not in head:
                raise DataError(
                    f"{path} has no column {one!r} (`columns.{name}`)", _heading_said(head), "missing_column"
                )


def _heading_said(head: Sequence[str]) -> str:
    """Returns what columns there are, and the delimiter to name where another one seems to have parted them."""
    between = next((mark for mark in (";", "\t", "|", ",") if len(head) == 1 and mark in head[0]), None)
    said = f"it has: {', '.join(head)}"
    return said if between is None else f"{said}; add `delimiter: {json.dumps(between)}` to `columns` if it parts them"


def _check_twice(head: Sequence[str], source: SourceFiles, path: Path) -> None:
    """Raises DataError where a column that is read stands twice: nothing says which one is meant."""
    for name, spec in source.columns.items():
        for one in () if name in _NO_COLUMN else as_sequence(spec):
            for used in (str(one), *SLOT.findall(str(one))):
                if head.count(used) > 1:
                    raise DataError(
                        f"{path} has {head.count(used)} columns named {used!r} (`columns.{name}`)",
                        "give each column a name of its own",
                        "duplicate_column",
                    )


def _csv_row(head: list[str], cells: list[str], where: str, index: int) -> Row | Reject:
    if len(cells) != len(head):
        return Reject(where, "", "bad_row", f"{len(cells)} fields, the head has {len(head)}")
    try:
        "".join(cells).encode("utf-8")
    except UnicodeEncodeError:
        return Reject(where, "", "bad_unicode", "not valid UTF-8")
    return Row(where, index, dict(zip(head, cells, strict=True)))


def _parquet_rows(path: Path, source: SourceFiles) -> Iterator[Row | Reject]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        index = 0
        with pq.ParquetFile(path) as file:
            _check_twice(file.schema_arrow.names, source, path)
            for batch in file.iter_batches(batch_size=256):
                for value in _parquet_values(batch):
                    where = f"{path.name}#{index}"
                    yield (
                        Reject(where, "", "bad_unicode", "not valid UTF-8")
                        if value is None
                        else Row(where, index, value)
                    )
                    index += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a Parquet file that can be read", "fetch or write it again", "bad_parquet"
        ) from error


def _parquet_values(batch: Any) -> Iterator[Mapping[str, Any] | None]:
    """Yields the rows of a batch; None for one whose text is not UTF-8, which Parquet does not check."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for at in range(batch.num_rows):
            try:
                yield batch.slice(at, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield None
