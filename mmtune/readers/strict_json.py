"""JSON and JSONL read strictly and in bounded memory.

Duplicate keys, ``NaN`` and ``Infinity`` are refused, and so is text that is not valid
Unicode. A byte order mark, CRLF and blank lines are accepted. Arrays are streamed: only one
chunk of the file and one item are in memory at a time.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mmtune.errors import DataError
from mmtune.readers.source import Refused, Row
from mmtune.records import Reject

MAX_LINE_BYTES = 64 << 20
MAX_ITEM_CHARS = 64 << 20
_CHUNK = 1 << 20
_SPACE = " \t\r\n"
_DELIMITERS = _SPACE + ",:]}"
_LONGEST_EXPONENT = 8


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise Refused("bad_json", f"the key {twice!r} stands twice in one object")
    return out


def _constant(name: str) -> Any:
    raise Refused("bad_json", f"{name} is not JSON")


_STRICT = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant)
_LENIENT = json.JSONDecoder()


def parse(text: str) -> Any:
    """Returns the value of one JSON text.

    Raises:
        Refused: ``bad_json``, ``too_deep``, ``too_large`` or ``bad_unicode``.
    """
    try:
        value = _STRICT.decode(text)
    except json.JSONDecodeError as error:
        raise Refused("bad_json", f"column {error.colno}: {_said(error)}") from error
    except RecursionError as error:
        raise Refused("too_deep", "nested too deeply") from error
    except ValueError as error:
        raise Refused("too_large", "a number has too many digits") from error
    check_unicode(text, value)
    return value


def _said(error: json.JSONDecodeError) -> str:
    """Returns the decoder's message as words of ours: some of its own end in ``at``."""
    message = error.msg.removesuffix(" starting at")
    return message[0].lower() + message[1:]


def check_unicode(raw: str, value: Any) -> None:
    """Raises Refused when a parsed text holds bytes or escapes that are not valid Unicode."""
    escaped = "\\ud" in raw or "\\uD" in raw
    if raw.isascii() and not escaped:
        return
    try:
        if escaped:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        raw.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refused("bad_unicode", "not valid UTF-8, or half of a surrogate pair") from error


def open_bytes(path: Path) -> IO[bytes]:
    """Returns a file opened for reading, unpacked when its name ends in ``.gz``.

    Raises:
        DataError: It is not there or not a file, damaged at its beginning, or UTF-16.
    """
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is not there"
        raise DataError(
            f"{path} {found}; a file is expected", "check the path in the recipe or command", "file_missing"
        )
    handle: Any = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # noqa: SIM115
    try:
        head = handle.peek(2)[:2]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        handle.close()
        raise _cut_gzip(path) from error
    if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        handle.close()
        raise DataError(f"{path} is UTF-16, and UTF-8 is read", "save it as UTF-8", "utf16")
    return handle


def iter_lines(path: Path) -> Iterator[tuple[int, str | Reject]]:
    """Yields ``(line number, text)`` of every line that is not blank, or its Reject."""
    with open_bytes(path) as handle:
        number = 0
        try:
            while line := handle.readline(MAX_LINE_BYTES):
                number += 1
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                where = f"{path.name}:{number}"
                if len(line) >= MAX_LINE_BYTES and not line.endswith(b"\n"):
                    while line and not line.endswith(b"\n"):
                        line = handle.readline(MAX_LINE_BYTES)
                    yield number, Reject(where, "", "too_large", f"longer than {MAX_LINE_BYTES >> 20} MiB")
                    continue
                try:
                    text = line.decode("utf-8").strip("\r\n")
                except UnicodeDecodeError as error:
                    yield number, Reject(where, "", "bad_unicode", f"byte {error.start} of the line is not UTF-8")
                    continue
                if text.strip():
                    yield number, text
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _cut_gzip(path) from error


def _cut_gzip(path: Path) -> DataError:
    return DataError(f"{path} is cut or damaged (gzip)", "fetch it again", "bad_gzip")


def iter_jsonl(path: Path) -> Iterator[Row | Reject]:
    """Yields the objects of a JSONL file; a line that cannot be read becomes a Reject."""
    index = -1
    for number, line in iter_lines(path):
        index += 1
        if isinstance(line, Reject):
            yield line
            continue
        where = f"{path.name}:{number}"
        try:
            yield Row(where, index, parse(line))
        except Refused as refused:
            yield Reject(where, "", refused.reason, refused.detail)


def iter_items(path: Path) -> Iterator[Row | Reject]:
    """Yields the items of a ``.json`` array, or of a JSONL file whatever its name says.

    The first character decides: ``[`` followed by anything but a JSONL row is an array.
    """
    names = path.name.removesuffix(".gz")
    if names.endswith((".jsonl", ".ndjson")) or _first_character(path) == "{":
        yield from iter_jsonl(path)
    else:
        for _, row in stream_arrays(path, ("",)):
            yield row


def _first_character(path: Path) -> str:
    with open_bytes(path) as handle:
        try:
            head = handle.read(4096)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _cut_gzip(path) from error
    text = head.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace").lstrip()
    return text[:1]


class _Buffer:
    """A window over the text of a file: everything before ``at`` may be forgotten."""

    def __init__(self, path: Path, handle: IO[bytes]) -> None:
        self.path = path
        # A byte that is not UTF-8 becomes a lone surrogate, so that only its own item is refused.
        self._reader = io.TextIOWrapper(handle, "utf-8-sig", errors="surrogateescape", newline="")
        self.text = ""
        self.at = 0
        self.line = 1
        self.end = False

    def more(self) -> bool:
        """Reads on; returns False at the end of the file."""
        if self.end:
            return False
        size = max(_CHUNK, len(self.text) - self.at)
        try:
            chunk = self._reader.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _cut_gzip(self.path) from error
        self.line += self.text.count("\n", 0, self.at)
        self.text = self.text[self.at :] + chunk
        self.at = 0
        self.end = not chunk
        return not self.end

    def peek(self) -> str:
        """Returns the next character that is no space, or an empty string at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def take(self, expected: str) -> None:
        """Steps over one expected character."""
        found = self.peek()
        if found != expected:
            raise self.broken(f"expected {expected!r}, found {found!r}" if found else "the file ends in the middle")
        self.at += 1

    def broken(self, why: str) -> DataError:
        line = self.line + self.text.count("\n", 0, self.at)
        return DataError(
            f"{self.path}:{line} is not valid JSON: {why}",
            "fetch or write the file again",
            "bad_json",
        )

    def value(self, where: str) -> tuple[Any, Reject | None]:
        """Returns the next value, or why it is refused while the file can go on."""
        self.peek()
        while True:
            refused: Refused | None = None
            value: Any = None
            try:
                try:
                    value, end = _STRICT.raw_decode(self.text, self.at)
                except Refused as caught:
                    refused = caught
                    _, end = _LENIENT.raw_decode(self.text, self.at)
                complete = self._complete(end)
            except json.JSONDecodeError as error:
                if self.end or not self._room():
                    why = "the file ends in the middle" if self.end else _said(error)
                    raise self.broken(why) from error
                complete = False
            except RecursionError as error:
                raise self.broken("nested too deeply") from error
            except ValueError as error:
                raise self.broken("a number has too many digits") from error
            if complete:
                break
            self.more()
        raw = self.text[self.at : end]
        self.at = end
        try:
            if refused is None:
                check_unicode(raw, value)
        except Refused as caught:
            refused = caught
        return value, Reject(where, "", refused.reason, refused.detail) if refused else None

    def _complete(self, end: int) -> bool:
        """Says whether a value ends there: at a chunk's edge the ``0`` of ``0.5`` is a value too."""
        after = self.text[end : end + 1]
        return self.end or (bool(after) and (after in _DELIMITERS or len(self.text) - end > _LONGEST_EXPONENT))

    def _room(self) -> bool:
        return len(self.text) - self.at < MAX_ITEM_CHARS


def stream_arrays(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[str, Row | Reject]]:
    """Yields ``(key, item)`` of the named arrays of a JSON file, in the file's order.

    The key ``""`` stands for an array at top level. A top-level value outside the arrays
    that is a string or number is yielded too, as a Row of index -1 under its own key; other
    values are passed over.

    Raises:
        DataError: The file is no JSON, or is cut; named with its line.
    """
    with open_bytes(path) as handle:
        buffer = _Buffer(path, handle)
        first = buffer.peek()
        if first == "[" and "" in keys:
            yield from _array(buffer, "", keep=True)
        elif first == "{":
            yield from _object(buffer, keys)
        elif not first:
            raise DataError(f"{path} is empty", "check the file", "empty_input")
        elif first == "[":
            raise DataError(
                f"{path} holds an array; an object with {' and '.join(map(repr, keys))} is expected",
                "check that this is the file that the reader expects",
                "wrong_layout",
            )
        else:
            raise buffer.broken(f"expected {'an array' if '' in keys else 'an object'}, found {first!r}")
        if buffer.peek():
            raise buffer.broken("there is more text after the end")


def _object(buffer: _Buffer, keys: tuple[str, ...]) -> Iterator[tuple[str, Row | Reject]]:
    buffer.take("{")
    seen: set[str] = set()
    everything = "" in keys
    while buffer.peek() != "}":
        key, bad = buffer.value(buffer.path.name)
        if bad or not isinstance(key, str):
            raise buffer.broken("a key is not a string")
        if key in seen:
            raise buffer.broken(f"the key {key!r} stands twice")
        seen.add(key)
        buffer.take(":")
        where = f"{buffer.path.name}#{key}"
        if everything:
            value, reject = buffer.value(where)
            yield key, reject or Row(where, len(seen) - 1, value)
        elif buffer.peek() == "[":
            yield from _array(buffer, key, keep=key in keys)
        else:
            value, reject = buffer.value(where)
            if isinstance(value, str | int) and not reject:
                yield key, Row(where, -1, value)
        if not _another(buffer, "}"):
            break
    buffer.take("}")
    missing = [key for key in keys if key and key not in seen]
    if missing:
        have = ", ".join(sorted(seen)) or "nothing"
        raise DataError(
            f"{buffer.path} has no {missing[0]!r} array; it has {have}",
            "check that this is the file that the reader expects",
            "wrong_layout",
        )


def _array(buffer: _Buffer, key: str, *, keep: bool) -> Iterator[tuple[str, Row | Reject]]:
    buffer.take("[")
    index = 0
    while buffer.peek() != "]":
        where = f"{buffer.path.name}#{key}/{index}" if key else f"{buffer.path.name}#{index}"
        value, reject = buffer.value(where)
        if keep:
            yield key, reject or Row(where, index, value)
        index += 1
        if not _another(buffer, "]"):
            break
    buffer.take("]")


def _another(buffer: _Buffer, close: str) -> bool:
    """Steps over a comma; says whether there was one, after which JSON wants another value."""
    if buffer.peek() != ",":
        return False
    buffer.at += 1
    if buffer.peek() == close:
        raise buffer.broken(f"a comma before {close!r}")
    return True
