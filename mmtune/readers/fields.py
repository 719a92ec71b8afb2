"""Typed access to the fields of a raw row; a wrong one is refused with its JSON pointer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mmtune.readers.source import Refused, Row, SourceFiles
from mmtune.records import Medium, Modality

_KINDS = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false"}


def kind(value: Any) -> str:
    """Returns what a JSON value is, in words."""
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


def wrong(pointer: str, expected: str, value: Any) -> Refused:
    """Returns the refusal of a field of the wrong type."""
    return Refused("bad_field", f"{pointer or '/'}: expected {expected}, found {kind(value)}")


# Keys of a row -> how it is read, for whoever named another reader; the first that a row has all of is told.
_READ_BY = (
    (("conversations",), "sharegpt"),
    (("messages",), "messages or sharegpt"),
    (("instruction", "output"), "alpaca"),
    (("query", "response"), "alpaca, columns: {instruction: query, output: response}"),
    (("question", "answer"), "table, columns: {question: question, answer: answer}"),
)


def missing(row: Mapping[str, Any], key: str, pointer: str = "") -> Refused:
    """Returns the refusal of a row without a field: what it has instead, and how such rows are read."""
    has = f"the row has {', '.join(map(str, row)) or 'nothing'}"
    fits = next((reader for keys, reader in _READ_BY if key not in keys and all(name in row for name in keys)), None)
    return Refused("bad_field", f"{pointer}/{key}: missing; {has}" + (f" (reader: {fits})" if fits else ""))


def as_object(value: Any, pointer: str = "") -> Mapping[str, Any]:
    """Returns a value that must be an object."""
    if not isinstance(value, Mapping):
        raise wrong(pointer, "an object", value)
    return value


def as_list(value: Any, pointer: str) -> list[Any]:
    """Returns a value that must be a list."""
    if not isinstance(value, list | tuple):
        raise wrong(pointer, "a list", value)
    return list(value)


def as_text(value: Any, pointer: str) -> str:
    """Returns a value that must be a string."""
    if not isinstance(value, str):
        raise wrong(pointer, "a string", value)
    return value


def text_field(row: Mapping[str, Any], key: str, pointer: str = "") -> str:
    """Returns a string field that must be there."""
    if key not in row:
        raise missing(row, key, pointer)
    return as_text(row[key], f"{pointer}/{key}")


def scalar_text(value: Any, pointer: str) -> str:
    """Returns a string, number or truth value as text; ``yes`` and ``no`` for the last.

    Raises:
        Refused: ``bad_field`` for anything else, NaN and infinity included.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise Refused("bad_field", f"{pointer}: expected a string, found {value}")
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return as_text(value, pointer)


def id_field(row: Mapping[str, Any], key: str, pointer: str = "") -> int | str:
    """Returns an id, a whole number or a string that is not empty."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise (
            wrong(f"{pointer}/{key}", "a whole number or a string", value)
            if key in row
            else Refused("bad_field", f"{pointer}/{key}: missing")
        )
    return value


def answer_text(text: str, pointer: str) -> str:
    """Returns an answer with outer space removed.

    Raises:
        Refused: ``empty_answer`` when nothing is left.
    """
    stripped = text.strip()
    if not stripped:
        raise Refused("empty_answer", f"{pointer}: the answer is empty")
    return stripped


def record_id(source: SourceFiles, own: Any, row: Row) -> str:
    """Returns ``source/own-id``, or ``source/split-index`` for rows that have no id."""
    if own is None or own == "":
        return source.row_id(row.index)
    return source.own_id(scalar_text(own, "/id"))


def media_of(value: Any, modality: Modality, pointer: str, strip: str = "") -> tuple[Medium, ...]:
    """Returns the media that a path, ``{"path", "bytes"}`` object or list of them names."""
    if value is None or value == "" or value == []:
        return ()
    if isinstance(value, list | tuple):
        return tuple(
            medium for at, item in enumerate(value) for medium in media_of(item, modality, f"{pointer}/{at}", strip)
        )
    if isinstance(value, Mapping):
        return (_medium_of_object(value, modality, pointer, strip),)
    if isinstance(value, bytes):
        return (Medium(modality, "", data=value),)
    return (Medium(modality, as_text(value, pointer).removeprefix(strip)),)


def _medium_of_object(value: Mapping[str, Any], modality: Modality, pointer: str, strip: str) -> Medium:
    data = value.get("bytes")
    path = value.get("path") or ""
    if data is not None and not isinstance(data, bytes):
        raise wrong(f"{pointer}/bytes", "bytes", data)
    if data is None and not path:
        raise Refused("bad_field", f"{pointer}: names no path and holds no bytes")
    named = as_text(path, f"{pointer}/path").removeprefix(strip)
    if data is None and "bytes" in value and named.startswith("/"):
        # As `to_parquet` of `datasets` writes a column of images that are files.
        stored = "to_parquet stores paths alone, save_to_disk the bytes too (reader: hf)"
        raise Refused("path_escape", f"{pointer}: {named!r} is not relative, and no bytes stand beside it; {stored}")
    return Medium(modality, named, data=data)
