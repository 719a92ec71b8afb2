"""Tables with a column map: CSV, TSV, JSONL, JSON, Parquet, and plain text lines.

``dev_sent_emo.csv``, read with ``columns: {text: Utterance, answer: Emotion}``::

    Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,...
    2,What?,Monica,surprise,negative,0,1,4,7,"00:21:01,927","00:21:03,261"

``questions.json`` of easy-VQA, read with
``columns: {question: 0, answer: 1, image: "images/{2}.png"}``::

    [["what is the red shape?", "triangle", 0], ["what is the color of the triangle?", "red", 0], ...]

``columns`` maps our names to the file's:

* ``question`` (or ``text``, ``instruction``), ``context``; ``answer`` (or ``output``) is taught;
* ``rationale``: how the answer is reached, for ``build.mixture.chain_of_thought``;
* ``image``, ``audio``, ``video``: one column or a list of them;
* ``references``, ``options``: a column that holds a list, or a list of columns;
* ``behaviour``: one column or a list of them, each a user's history that the model is shown: ids of items, oldest
  first, as a list (of JSON too, in a CSV file) or a text with spaces, commas or bars between them; empty for none;
* ``history``: the same, or a list of columns of one item each, that ``extract`` knows and the model is not shown;
* ``id``; ``metadata``: columns for grouping scores;
* ``rows``: the name of the array in a JSON object; without it an object is a table whose keys are
  the column ``key``; ``delimiter`` of a CSV file; ``strip``: removed from the front of media paths.

A value is a column's name or index, a template with names or indexes in braces, or a fixed text
after ``=``. ``tasks: [caption]`` names the task; else a row with a question is ``vqa`` (with media to see or
hear) or ``instruction``. Where no column holds questions, a row with media is ``label``, and one with an
answer only is ``text``; where one does, a row without is refused.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtune.errors import DataError, RecipeError
from mmtune.readers.fields import answer_text, as_list, kind, media_of, record_id, scalar_text
from mmtune.readers.histories import history_items
from mmtune.readers.source import Refused, Row, SourceFiles, read_rows
from mmtune.readers.strict_json import iter_jsonl, iter_lines, open_bytes, stream_arrays
from mmtune.records import IN_FILES, Medium, Record, Reject, history

_SLOT = re.compile(r"\{([^{}]+)\}")
_TAUGHT = ("answer", "output", "target", "references")
_KNOWN = {*_TAUGHT} | {"question", "text", "instruction", "context", "options", "id", "metadata", "rows", "delimiter"}
_KNOWN |= {"strip", "rationale", "history", "behaviour", "image", "audio", "video", "images", "audios", "videos"}
_UNASKED = ("caption", "label", "text")
_MAX_FIELD = 64 << 20
_BINARY = re.compile("[\0-\x08\x0e-\x1f\ud800-\udfff]")


def read_table(source: SourceFiles) -> Iterator[Record | Reject]:
    """Yields one record per row.

    Raises:
        RecipeError: ``columns`` is missing or names something unknown.
        DataError: The file is missing or damaged, or has no such column.
    """
    path = source.file("path")
    check_columns(source)
    yield from read_rows(_rows(source, path), lambda row: [table_record(source, row)], source=source)


def check_columns(source: SourceFiles) -> None:
    """Raises RecipeError unless the column map says what is taught."""
    unknown = sorted(set(source.columns) - _KNOWN)
    if unknown:
        raise RecipeError(
            f"source {source.id!r}: columns has the unknown name {unknown[0]!r}",
            f"known: {', '.join(sorted(_KNOWN))}",
            "unknown_column",
        )
    if source.split == "train" and not set(_TAUGHT) & set(source.columns):
        raise RecipeError(
            f"source {source.id!r} needs `columns` with an `answer`",
            "for example: columns: {question: q, answer: a, image: file}",
            "missing_columns",
        )


def table_record(source: SourceFiles, row: Row) -> Record:
    """Returns the record of one row, a mapping or a list."""
    if not isinstance(row.value, Mapping | list | tuple):
        raise Refused("bad_field", f"/: expected an object or a list, found {kind(row.value)}")
    columns = source.columns
    question = _question(source, row.value)
    context = _first_text(columns, ("context",), row.value)
    references = _texts(columns, "references", row.value)
    answer = _first_text(columns, ("answer", "output", "target"), row.value)
    answer = answer or next((text for text in references if text), "")
    has_answer = bool(set(_TAUGHT) & set(columns))
    if has_answer:
        answer = answer_text(answer, f"/{next(columns[name] for name in _TAUGHT if name in columns)}")
    options = _texts(columns, "options", row.value)
    media = _media(source, row.value)
    own = _first(columns, ("id",), row.value)
    metadata = {}
    for name in _as_sequence(columns.get("metadata", [])):
        value = _cell(name, row.value, "metadata")
        if value is not None:
            metadata[str(name)] = scalar_text(value, f"/{name}")
    return Record(
        id=record_id(source, own, row),
        source=source.id,
        task=_task(source, question, media),
        split=source.split,
        text=question,
        context=context,
        media=media,
        references=references or ((answer,) if answer else ()),
        target=answer if references and answer != references[0] else "",
        options=options,
        metadata=metadata,
        rationale=_first_text(columns, ("rationale",), row.value),
        fields=_fields(row.value) if source.keep_fields else {},
        history=_history(columns, row.value),
        where=row.where,
    )


def _question(source: SourceFiles, row: Any) -> str:
    names = ("question", "text", "instruction")
    question = _first_text(source.columns, names, row)
    named = next((source.columns[name] for name in names if name in source.columns), None)
    if named is not None and not question.strip() and not set(source.tasks) & set(_UNASKED):
        raise Refused("empty_question", f"/{named}: the question is empty")
    return question


def _fields(row: Any) -> dict[str, Any]:
    """Returns the columns of a row without its bytes."""
    if not isinstance(row, Mapping):
        return {}
    return {str(key): value for key, value in row.items() if not isinstance(value, bytes)}


def _task(source: SourceFiles, question: str, media: Sequence[Medium]) -> str:
    if len(source.tasks) == 1:
        return source.tasks[0]
    if question:
        return "vqa" if any(medium.modality != "behaviour" for medium in media) else "instruction"
    return "label" if media else "text"


def _as_sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _cell(spec: str | int, row: Any, name: str) -> Any:
    """Returns what a column name, index, template or fixed text gives for one row."""
    if isinstance(spec, int):
        return _at(row, spec, name)
    if spec.startswith("="):
        return spec[1:]
    if isinstance(row, Mapping) and spec in row:
        return row[spec]
    if "{" in spec:
        return _SLOT.sub(lambda match: scalar_text(_at(row, match.group(1), name), f"/{match.group(1)}"), spec)
    return _at(row, spec, name)


def _at(row: Any, key: str | int, name: str) -> Any:
    if isinstance(row, Mapping):
        if key in row:
            return row[key]
        raise Refused("bad_field", f"/{key} (for {name}): missing; the row has {', '.join(map(str, row)) or 'nothing'}")
    try:
        return row[int(key)]
    except (IndexError, ValueError) as error:
        raise Refused("bad_field", f"/{key} (for {name}): missing; the row has {len(row)} values") from error


def _first_text(columns: Mapping[str, Any], names: Sequence[str], row: Any) -> str:
    name = next((name for name in names if name in columns), None)
    value = None if name is None else _cell(columns[name], row, name)
    return "" if name is None or value is None else scalar_text(value, f"/{columns[name]} (for {name})")


def _first(columns: Mapping[str, Any], names: Sequence[str], row: Any) -> Any:
    return next((_cell(columns[name], row, name) for name in names if name in columns), None)


def _texts(columns: Mapping[str, Any], name: str, row: Any) -> tuple[str, ...]:
    if name not in columns:
        return ()
    spec = columns[name]
    if isinstance(spec, list | tuple):
        values = [_cell(one, row, name) for one in spec]
    else:
        found = _cell(spec, row, name)
        if isinstance(spec, str) and spec.startswith("="):
            found = spec[1:].split("|")
        if found is None:
            return ()
        values = as_list(found, f"/{spec}") if isinstance(found, list | tuple) else [found]
    return tuple(scalar_text(value, f"/{spec}/{at}") for at, value in enumerate(values) if value is not None)


def _history(columns: Mapping[str, Any], row: Any) -> tuple[str, ...] | None:
    """Returns the items of the column ``history``; of a list of columns every one that is filled holds one item.

    None without such a column.
    """
    spec = columns.get("history")
    if isinstance(spec, list | tuple):
        return tuple(item for item in _texts(columns, "history", row) if item)
    return None if spec is None else history_items(_cell(spec, row, "history"), f"/{spec}")


def _media(source: SourceFiles, row: Any) -> tuple[Medium, ...]:
    strip = str(source.columns.get("strip", ""))
    found: list[Medium] = []
    for modality in IN_FILES:
        for name in (modality, f"{modality}s"):
            if name in source.columns:
                for spec in _as_sequence(source.columns[name]):
                    media = media_of(_cell(spec, row, name), modality, f"/{spec}", strip)
                    if not media and name == modality:
                        raise Refused(
                            f"no_{modality}", f"/{spec} (for {name}): empty; `{name}s` takes rows without one"
                        )
                    found += media
    for spec in _as_sequence(source.columns.get("behaviour", ())):
        found.append(history(history_items(_cell(spec, row, "behaviour"), f"/{spec}")))
    return tuple(found)


def _rows(source: SourceFiles, path: Path) -> Iterator[Row | Reject]:
    name = path.name.removesuffix(".gz").lower()
    if name.endswith((".jsonl", ".ndjson")):
        return iter_jsonl(path)
    if name.endswith(".json"):
        return _json_rows(source, path)
    if name.endswith(".parquet"):
        return _parquet_rows(path)
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
    for name, spec in source.columns.items():
        if name in ("rows", "delimiter", "strip"):
            continue
        for one in _as_sequence(spec):
            plain = isinstance(one, str) and not one.startswith("=") and "{" not in one
            if plain and one not in head:
                raise DataError(
                    f"{path} has no column {one!r} (`columns.{name}`)", f"it has: {', '.join(head)}", "missing_column"
                )


def _csv_row(head: list[str], cells: list[str], where: str, index: int) -> Row | Reject:
    if len(cells) != len(head):
        return Reject(where, "", "bad_row", f"{len(cells)} fields, the head has {len(head)}")
    try:
        "".join(cells).encode("utf-8")
    except UnicodeEncodeError:
        return Reject(where, "", "bad_unicode", "not valid UTF-8")
    return Row(where, index, dict(zip(head, cells, strict=True)))


def _parquet_rows(path: Path) -> Iterator[Row | Reject]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        index = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for value in batch.to_pylist():
                    yield Row(f"{path.name}#{index}", index, value)
                    index += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a Parquet file that can be read", "fetch or write it again", "bad_parquet"
        ) from error
