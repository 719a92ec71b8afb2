"""What a cell says a user chose before: ids of items, oldest first."""

from __future__ import annotations

import re
from typing import Any

from mmtune.readers.fields import kind, scalar_text
from mmtune.readers.source import Refused
from mmtune.readers.strict_json import parse

_BETWEEN = re.compile(r"[\s,;|]+")
_MISSING = ("nan", "NaN", "null", "NULL", "None", "<NA>")


def history_items(value: Any, pointer: str) -> tuple[str, ...]:
    """Returns the items of a list as they are, those of a text between spaces, commas and bars; a number is one item.

    Args:
        value: Of the cell; nothing is an empty history.
        pointer: Where it stands, for the refusal.

    Raises:
        Refused: ``bad_field`` where it is no history.
    """
    if isinstance(value, str) and not value.lstrip().startswith("["):
        items = tuple(item for item in _BETWEEN.split(value) if item)
        missing = next((item for item in items if item in _MISSING), None)
        if missing is not None:
            raise Refused("bad_field", f"{pointer}: {missing!r} is no item; leave the cell empty where there is none")
        return items
    if isinstance(value, str):
        value = _list_of(value, pointer)
    listed = () if value is None else value if isinstance(value, list | tuple) else (value,)
    return tuple(_item(item, f"{pointer}/{at}") for at, item in enumerate(listed))


def _list_of(text: str, pointer: str) -> Any:
    try:
        return parse(text)
    except Refused as refused:
        raise Refused("bad_field", f"{pointer}: begins like a list, and {refused.detail}") from refused


def _item(value: Any, pointer: str) -> str:
    if value is None or value == "" or value != value:
        raise Refused("bad_field", f"{pointer}: expected an item, found {'nothing' if value == '' else kind(value)}")
    text = scalar_text(value, pointer)
    if "\n" in text:
        raise Refused("bad_field", f"{pointer}: an item has no line break")
    return text
