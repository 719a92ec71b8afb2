"""The rows of a file that a source wants: those whose columns hold the values of its ``where``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mmtune.errors import DataError
from mmtune.records import Reject

Value = str | int | float | bool
Wanted = Mapping[str, Value | tuple[Value, ...]]
"""A column's name, or its index where rows are lists, to the value that it must hold, or to several of them."""

_MOST_TOLD = 8


class Sieve:
    """Tells wanted rows, and remembers what the others held for when none is wanted.

    Args:
        where: What is wanted; all of it must hold.
    """

    def __init__(self, where: Wanted) -> None:
        self._where = {column: values if isinstance(values, tuple) else (values,) for column, values in where.items()}
        self._held: dict[str, dict[str, None]] = {column: {} for column in where}
        self._columns: tuple[str, ...] = ()
        self._kept = self._seen = False

    def keeps(self, row: Any) -> bool:
        """Says whether a row, a mapping or a list, is wanted; a column that it has not holds nothing."""
        kept, self._seen = True, True
        for column, wanted in self._where.items():
            value = _cell(row, column)
            held = self._held[column]
            if value is not None and len(held) <= _MOST_TOLD:
                held[_text(value)] = None
            kept &= any(_same(value, one) for one in wanted)
        self._kept |= kept
        if isinstance(row, Mapping):
            self._columns = self._columns or tuple(map(str, row))
        return kept

    def check(self, source: str, file: Any) -> None:
        """Raises DataError where rows were seen and none was wanted."""
        if self._kept or not self._seen:
            return
        said = ", ".join(f"{column}: {' or '.join(map(_text, wanted))}" for column, wanted in self._where.items())
        unknown = next((column for column, held in self._held.items() if not held), None)
        if unknown is not None:
            columns = f"; the first row has {', '.join(self._columns)}" if self._columns else ""
            hint = f"there is no column {unknown!r}{columns}"
        else:
            hint = "; ".join(f"{column} holds {_told(held)}" for column, held in self._held.items())
        raise DataError(f"source {source!r}: no row of {file} is wanted by where: {{{said}}}", hint, "none_wanted")


def wanted_rows(rows: Iterable[Any], where: Wanted, source: str, file: Any) -> Iterator[Any]:
    """Yields the rows that are wanted, by their ``value``, and what could not be parsed.

    Raises:
        DataError: There are rows, and none is wanted.
    """
    sieve = Sieve(where)
    for row in rows:
        if isinstance(row, Reject) or sieve.keeps(row.value):
            yield row
    sieve.check(source, file)


def _cell(row: Any, column: str) -> Any:
    if isinstance(row, Mapping):
        return row.get(column)
    if isinstance(row, list | tuple) and column.isdecimal() and int(column) < len(row):
        return row[int(column)]
    return None


def _same(value: Any, wanted: Value) -> bool:
    if value is None:
        return False
    # A CSV file writes truth as text, in one way or another.
    return _text(value).lower() == _text(wanted) if isinstance(wanted, bool) else _text(value) == _text(wanted)


def _text(value: Any) -> str:
    """Returns a value as a CSV file would have it; a whole number without a point."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _told(held: Iterable[str]) -> str:
    names = sorted(held)
    return ", ".join(names[:_MOST_TOLD]) + (", ..." if len(names) > _MOST_TOLD else "")
