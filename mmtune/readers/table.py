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

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmtune.errors import RecipeError
from mmtune.readers.fields import answer_text, as_list, kind, media_of, record_id, scalar_text
from mmtune.readers.histories import history_items
from mmtune.readers.source import Refused, Row, SourceFiles, read_rows
from mmtune.readers.table_rows import SLOT, as_sequence, table_rows
from mmtune.records import IN_FILES, MODALITIES, Medium, Record, Reject, history

_TAUGHT = ("answer", "output", "target", "references")
_KNOWN = {*_TAUGHT} | {"question", "text", "instruction", "context", "options", "id", "metadata", "rows", "delimiter"}
_KNOWN |= {"strip", "rationale", "history", "behaviour", "image", "audio", "video", "images", "audios", "videos"}
_BETWEEN = re.compile(r"[\s,;|]+")
_MISSING = ("nan", "NaN", "null", "NULL", "None", "<NA>")
_LISTED = frozenset({"references", "options", "history", "metadata", *MODALITIES, *(f"{name}s" for name in MODALITIES)})
"""Names that may stand for a list of columns."""
_UNASKED = ("caption", "label", "text")


def read_table(source: SourceFiles) -> Iterator[Record | Reject]:
    """Yields one record per row.

    Raises:
        RecipeError: ``columns`` is missing or names something unknown.
        DataError: The file is missing or damaged, or has no such column.
    """
    path = source.file("path")
    check_columns(source)
    _check_delimiter(source)
    yield from read_rows(table_rows(source, path), lambda row: [table_record(source, row)], source=source)


def check_columns(source: SourceFiles) -> None:
    """Raises RecipeError unless the column map says what is taught."""
    unknown = sorted(set(source.columns) - _KNOWN)
    if unknown:
        raise RecipeError(
            f"source {source.id!r}: columns has the unknown name {unknown[0]!r}",
            f"known: {', '.join(sorted(_KNOWN))}",
            "unknown_column",
        )
    listed = sorted(name for name, spec in source.columns.items() if isinstance(spec, list) and name not in _LISTED)
    if listed:
        raise RecipeError(
            f"source {source.id!r}: columns.{listed[0]} is a list; it takes one column",
            "join columns in a template, such as '{a} {b}'",
            "bad_column",
        )
    if source.split == "train" and not set(_TAUGHT) & set(source.columns):
        raise RecipeError(
            f"source {source.id!r} needs `columns` with an `answer`",
            "for example: columns: {question: q, answer: a, image: file}",
            "missing_columns",
        )


def _check_delimiter(source: SourceFiles) -> None:
    delimiter = source.columns.get("delimiter", ",")
    if not isinstance(delimiter, str) or len(delimiter) != 1 or delimiter in '"\r\n':
        raise RecipeError(
            f"source {source.id!r}: columns.delimiter is {delimiter!r}; it is one character, such as ';'",
            'write a tab as "\\t"',
            "bad_column",
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
    for name in as_sequence(columns.get("metadata", [])):
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


def _cell(spec: str | int, row: Any, name: str) -> Any:
    """Returns what a column name, index, template or fixed text gives for one row."""
    if isinstance(spec, int):
        return _at(row, spec, name)
    if spec.startswith("="):
        return spec[1:]
    if isinstance(row, Mapping) and spec in row:
        return row[spec]
    if "{" in spec:
        return SLOT.sub(lambda match: scalar_text(_at(row, match.group(1), name), f"/{match.group(1)}"), spec)
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
                for spec in as_sequence(source.columns[name]):
                    media = media_of(_cell(spec, row, name), modality, f"/{spec}", strip)
                    if not media and name == modality:
                        raise Refused(
                            f"no_{modality}", f"/{spec} (for {name}): empty; `{name}s` takes rows without one"
                        )
                    found += media
    for spec in as_sequence(source.columns.get("behaviour", ())):
        found.append(history(history_items(_cell(spec, row, "behaviour"), f"/{spec}")))
    return tuple(found)
