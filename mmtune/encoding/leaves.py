"""The strings inside tool schemas and call arguments, hidden like any other text.

A template writes them as JSON, as ASCII-escaped JSON or bare, and which one is found by
rendering a probe text that looks different in each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from mmtune.encoding.refused import Refused

_PROBE = '"\u00e9\n'
_FORMS = {_PROBE: "raw", json.dumps(_PROBE, ensure_ascii=False)[1:-1]: "json", json.dumps(_PROBE)[1:-1]: "ascii"}
# Names that can spell no control token; anything else as a key is refused.
_NAME = re.compile(r"[A-Za-z0-9_$.\- ]{1,200}")
# Templates branch on a schema's type, so it must be seen as it is.
_LITERAL_KEYS = frozenset({"type"})


def probed() -> str:
    """Returns the probe text."""
    return _PROBE


def probe_mode(shown: str) -> str:
    """Returns the form in which the probe was written, or nothing."""
    return _FORMS.get(shown, "")


def escaped(text: str, form: str) -> str:
    """Returns a text as a template writes it in a form."""
    return text if form == "raw" else json.dumps(text, ensure_ascii=form == "ascii")[1:-1]


@lru_cache(maxsize=256)
def leaves_of(text: str) -> tuple[str, tuple[str, ...]]:
    """Returns the structure of a JSON text without its strings, and the strings in order."""
    strings: list[str] = []

    def take(value: str) -> str:
        strings.append(value)
        return "*"

    return json.dumps(_walk(_parse(text), take)), tuple(strings)


def with_leaves(text: str, replacement: Callable[[], str]) -> Any:
    """Returns a JSON text as a value whose strings are replaced, in the order of ``leaves_of``."""
    return _walk(_parse(text), lambda value: replacement())


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise Refused("bad_tools", "tools and call arguments must be JSON") from error


def _walk(value: Any, take: Callable[[str], str], key: str = "") -> Any:
    if isinstance(value, str):
        literal = not value or (key in _LITERAL_KEYS and _NAME.fullmatch(value))
        return value if literal else take(value)
    if isinstance(value, list):
        return [_walk(item, take, key) for item in value]
    if isinstance(value, dict):
        for name in value:
            if not _NAME.fullmatch(name):
                raise Refused("bad_tools", f"the key {name[:80]!r} in tools or call arguments is no plain name")
        return {name: _walk(item, take, name) for name, item in value.items()}
    return value
