"""keys: every key of a recipe with type, default and meaning, from the schema itself."""

from __future__ import annotations

import difflib
import json
import re
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from mmtune.errors import RecipeError
from mmtune.recipe import Recipe
from mmtune.recipe.elsewhere import ELSEWHERE, NEEDLESS


class Key(NamedTuple):
    """One line of the reference; ``default`` is None where the key must be given."""

    path: str
    kind: str
    default: str | None
    about: str


def schema(section: str = "") -> dict[str, Any]:
    """Returns the JSON Schema of a recipe, or of one section of it.

    Raises:
        RecipeError: There is no such key.
    """
    whole = Recipe.model_json_schema()
    if not section:
        return whole
    found: dict[str, Any] = {"$ref": "#"}
    names = section.split(".")
    for at, name in enumerate(names):
        properties = _target(found, whole).get("properties", {})
        if name not in properties:
            near = difflib.get_close_matches(name, properties, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(properties) or 'no keys below it'}"
            inside = f": there is no {name!r} in {'.'.join(names[:at])}" if at else ""
            raise RecipeError(f"a recipe has no key {section!r}{inside}", hint, "no_key")
        found = properties[name]
    return {**found, **_target(found, whole), "$defs": whole["$defs"]}


def list_keys(section: str = "") -> list[Key]:
    """Returns every key at or below a section, in the order of the schema.

    Args:
        section: Its path; or a name that stands somewhere in paths, a part of one, or what another trainer calls a key.

    Raises:
        RecipeError: There is no such key.
    """
    if section and "." not in section and section not in schema()["properties"]:
        return _named(section)
    found = schema(section)
    below = list(_keys(found, found, f"{section}." if section else ""))
    if below:
        return below
    parent, _, name = section.rpartition(".")
    return [_key(section, found, found, required=name in schema(parent).get("required", ()))]


def _named(word: str) -> list[Key]:
    """Returns the keys whose paths have a name, else that which another trainer calls so, else those with a part of it.

    Raises:
        RecipeError: There is none.
    """
    everything = list_keys()
    names = {key: key.path.replace("[]", "").split(".") for key in everything}
    found = [key for key in everything if word in names[key]]
    if not found and word in ELSEWHERE:
        return list_keys(ELSEWHERE[word].replace("[]", ""))
    if not found and word in NEEDLESS:
        raise RecipeError(f"a recipe has no key {word!r}", NEEDLESS[word], "no_key")
    found = found or [key for key in everything if word in names[key][-1]]
    if not found:
        schema(word)
    return found


def render(keys: list[Key]) -> str:
    """Returns the keys as text of the terminal's width, one paragraph each."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    lines = []
    for key in keys:
        given = "" if key.default is None else f", default {key.default}"
        lines.append(f"{key.path}  ({key.kind}{given or ', required'})")
        lines += textwrap.wrap(key.about, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _keys(node: dict[str, Any], whole: dict[str, Any], prefix: str) -> Iterator[Key]:
    required = node.get("required", ())
    for name, value in node.get("properties", {}).items():
        target = _target(value, whole)
        if "properties" in target:
            listed = any(one.get("type") == "array" for one in (value, *value.get("anyOf", ())))
            many = "[]" if target is not value and listed else ""
            yield from _keys(target, whole, f"{prefix}{name}{many}.")
        else:
            yield _key(prefix + name, value, whole, required=name in required)


def _key(path: str, value: dict[str, Any], whole: dict[str, Any], *, required: bool) -> Key:
    default = None if required else json.dumps(value.get("default"))
    about = re.sub(r"\s+", " ", value.get("description", "")).strip()
    return Key(path, _kind(value, whole), default, about)


def _target(value: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """Returns the section that a property holds, one of several or one or none; else the property itself."""
    if value.get("$ref") == "#":
        return whole
    inner = [value.get("items", {}), *value.get("anyOf", ()), *value.get("allOf", ()), value]
    reference = next((one["$ref"] for one in inner if "$ref" in one), None)
    return value if reference is None else whole["$defs"][reference.rsplit("/", 1)[1]]


def _kind(value: dict[str, Any], whole: dict[str, Any]) -> str:
    if "$ref" in value:
        return _kind(_target(value, whole), whole)
    if "anyOf" in value:
        return " | ".join(_kind(one, whole) for one in value["anyOf"])
    if "enum" in value:
        return " | ".join(map(str, value["enum"]))
    if "const" in value:
        return str(value["const"])
    if value.get("type") == "array":
        return f"list of {_kind(value.get('items', {}), whole)}"
    if value.get("type") == "object":
        return "mapping"
    return {"string": "text", "null": "none"}.get(str(value.get("type")), str(value.get("type", "any"))) + _range(value)


def _range(value: dict[str, Any]) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    found = [f"{sign} {value[name]:g}" for name, sign in signs.items() if name in value]
    return f" {' and '.join(found)}" if found else ""
