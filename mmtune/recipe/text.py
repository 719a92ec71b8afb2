"""A recipe file to a checked Recipe: strict YAML, ``extends``, environment and ``--set``."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mmtune.errors import RecipeError
from mmtune.recipe.elsewhere import advice
from mmtune.recipe.paths import resolve_paths
from mmtune.recipe.schema import Recipe
from mmtune.recipe.sources import COLUMN_PATHS

DEFAULT_NAME = "mmtune.yaml"
ENV_PREFIX = "MMTUNE_"
# Variables of the tool itself, not recipe keys.
_RESERVED_ENV = ("MMTUNE_TEST_", "MMTUNE_LAUNCHED", "MMTUNE_RECIPE", "MMTUNE_NO_")
_MAX_BYTES = 4 << 20
# What pydantic names beside keys: the kinds of a value that may have several, and that a key itself is meant.
_NO_KEY = re.compile(r"(?:literal|tuple|list|dict|function-\w+)\[.*|\[key\]|constrained-\w+|str|int|float|bool")


class _Loader(yaml.SafeLoader):
    """Safe YAML with floats such as ``1e-4``, no booleans from yes/no, no duplicates, aliases or tags."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise _problem(self.peek_event().start_mark, "YAML aliases (*name) are not allowed in a recipe")
        if getattr(self.peek_event(), "tag", None) is not None:
            raise _problem(self.peek_event().start_mark, "YAML tags (!name) are not allowed in a recipe")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, Any] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int):
                raise _problem(key_node.start_mark, "a key must be plain text")
            if key in seen:
                raise _problem(
                    key_node.start_mark, f"the key `{key}` appears twice (first on line {seen[key].line + 1})"
                )
            seen[key] = key_node.start_mark
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 reads `no` as false and dates as dates; keep only true/false, ints and floats.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if tag.rsplit(":", 1)[1] in ("null",)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)|[-+]?[0-9][0-9_]*\.[0-9_]*"
        r"|[-+]?\.[0-9]+(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN))$"
    ),
    list("-+0123456789."),
)


class _RecipeProblem(Exception):
    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line, self.text = line, text


def _problem(mark: Any, text: str) -> _RecipeProblem:
    return _RecipeProblem(mark.line + 1, text)


def find_recipe(path: Path | None) -> Path:
    """Returns the recipe to read: the given file, or ``./mmtune.yaml``.

    Raises:
        RecipeError: There is none.
    """
    chosen = path if path is not None else Path(DEFAULT_NAME)
    if chosen.is_file():
        return chosen
    what = f"the recipe {chosen} is not there" if path is not None else "no recipe given and no ./mmtune.yaml here"
    hint = "run: mmtune init (lists recipes), or name a recipe file"
    if path is not None and path.suffix not in (".yaml", ".yml") and path.parent == Path():
        hint = f"run: mmtune init {path.name}  (copies the shipped recipe of that name, if there is one)"
    raise RecipeError(what, hint, "recipe_missing")


def load_recipe(path: Path | None, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> Recipe:
    """Returns the checked recipe.

    Args:
        path: The YAML file; None reads ``./mmtune.yaml``.
        overrides: ``a.b=value`` texts of ``--set``, in order.
        environ: Environment to read ``MMTUNE_A__B`` from; default the process's own.

    Raises:
        RecipeError: Unknown key (with the nearest known one and the line), wrong type or
            value, duplicate key, bad YAML, or a circle of ``extends``.
    """
    found = find_recipe(path)
    values = _read_with_parents(found, ())
    here, given = Path.cwd(), dict[tuple[str, ...], str]()
    for key, text in _environment(os.environ if environ is None else environ):
        given[key] = f"the environment's {ENV_PREFIX}{'__'.join(key).upper()}"
        values = resolve_paths(_assign(values, key, text, given[key]), here)
    for override in overrides:
        name, equals, text = override.partition("=")
        keys = tuple(name.strip().split("."))
        if not equals or not all(keys):
            raise RecipeError(f"--set {override!r} is not of the form a.b=value", "example: --set finetune.epochs=2")
        given[keys] = f"--set {name}"
        values = resolve_paths(_assign(values, keys, text, given[keys]), here)
    return check_recipe(values, found, given)


def check_recipe(values: Mapping[str, Any], path: Path, given: Mapping[tuple[str, ...], str] | None = None) -> Recipe:
    """Returns a Recipe from plain values, or raises RecipeError with one line per problem.

    Args:
        values: Of the whole recipe.
        path: The file, for errors.
        given: Keys that do not stand in it, and what gave them.
    """
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        outside = dict(given or {})
        places = {key: f"line {line}" for key, line in _key_lines(path).items()} | outside
        problems = [_describe(item, places) for item in error.errors()]
        unique = _told_once(list(dict.fromkeys(problems)))
        hint = "mend the recipe; `mmtune init` lists working ones"
        if all(any(one.startswith(f"{source}: ") for source in outside.values()) for one in unique):
            # The recipe may be sound.
            hint = "mend what was given beside the recipe; `mmtune keys` lists all keys"
        raise RecipeError(f"{path}: " + "; ".join(unique), hint, "bad_recipe") from error


def _read_with_parents(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in children:
        chain = " -> ".join(child.name for child in (*children, path))
        raise RecipeError(f"recipes extend each other in a circle: {chain}", "remove one `extends`")
    values = _read_yaml(path)
    parent = values.pop("extends", None)
    values = resolve_paths(values, path.parent)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise RecipeError(f"{path}: `extends` must be one file name", "example: extends: base.yaml")
    base = path.parent / parent
    if not base.is_file():
        raise RecipeError(f"{path}: `extends` names {base}, which is not there", "a path is relative to the recipe")
    return _merge(_read_with_parents(base, (*children, path)), values)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
        if len(raw) > _MAX_BYTES:
            raise RecipeError(f"{path} is larger than 4 MiB", "is it a recipe?")
        values = yaml.load(raw.decode("utf-8-sig"), Loader=_Loader)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}", "check its rights") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text", "save it as UTF-8") from error
    except _RecipeProblem as error:
        raise RecipeError(f"{path}:{error.line}: {error.text}", "mend that line") from error
    except RecursionError as error:
        raise RecipeError(f"{path} is nested too deeply", "is it a recipe?") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise RecipeError(f"{path}:{line}: not valid YAML: {error.problem}", "mend that line") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}", "mend it") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not a recipe: expected `key: value` lines", "run: mmtune init")
    return values


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _environment(environ: Mapping[str, str]) -> list[tuple[tuple[str, ...], str]]:
    found = []
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX) and not name.startswith(_RESERVED_ENV):
            found.append((tuple(name[len(ENV_PREFIX) :].lower().split("__")), environ[name]))
    return found


def _assign(values: Mapping[str, Any], keys: tuple[str, ...], text: str, what: str) -> dict[str, Any]:
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, _RecipeProblem) as error:
        shown = text if len(text) <= 80 else f"{text[:77]}..."
        raise RecipeError(f"{what}: {shown!r} is not a YAML value", "quote it") from error
    if keys == ("extends",):
        raise RecipeError(f"{what}: `extends` stands in the recipe's file alone", "write it there")
    return _assign_at(values, keys, value, what)


def _assign_at(values: Any, keys: tuple[str, ...], value: Any, what: str) -> Any:
    head, rest = keys[0], keys[1:]
    if isinstance(values, list):
        if not head.isdigit() or int(head) >= len(values):
            raise RecipeError(f"{what}: `{head}` is not an index of a list of {len(values)}", "count from 0")
        copy = list(values)
        copy[int(head)] = _assign_at(copy[int(head)], rest, value, what) if rest else value
        return copy
    if values is not None and not isinstance(values, Mapping):
        raise RecipeError(f"{what}: there is no section above `{head}`", "check the key")
    out = dict(values or {})
    out[head] = _assign_at(out.get(head), rest, value, what) if rest else value
    return out


def _describe(item: Any, places: Mapping[tuple[str, ...], str]) -> str:
    location = tuple(str(part) for part in item["loc"] if not _NO_KEY.fullmatch(str(part)))
    name = ".".join(location)
    place = places.get(location) or places.get(location[:-1])
    where = f"{place}: " if place else ""
    if item["type"] == "extra_forbidden":
        told = advice(location[-1], _known_keys(location[:-1]), [*_paths(Recipe), *COLUMN_PATHS])
        return f"{where}unknown key `{name}`; {told}"
    if item["type"] == "missing":
        return f"{where}`{name}` is required"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "model_type":
        message = f"expected keys of its own: {', '.join(sorted(_known_keys(location)))}"
    if item["type"] == "tuple_type":
        # A list of YAML is a tuple of the schema, which nobody who writes one has heard of.
        message = "input should be a list"
    given = item.get("input")
    found = f" (found {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{where}`{name}`: {message[0].lower()}{message[1:]}{found}" if name else f"{where}{message}"


def _told_once(problems: Sequence[str]) -> list[str]:
    """Returns the problems, each list of known keys behind the first that names it alone."""
    lists = [problem.partition("; known keys: ")[2] for problem in problems]
    return [
        problem.removesuffix(f"; known keys: {keys}") if keys and keys in lists[:at] else problem
        for at, (problem, keys) in enumerate(zip(problems, lists, strict=True))
    ]


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yields the whole path of every key below a section."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        inner = _inner_model(field.annotation)
        if inner is not None:
            many = "[]" if inner.__name__ in str(field.annotation) and "tuple[" in str(field.annotation) else ""
            yield from _paths(inner, f"{prefix}{name}{many}.")


def _known_keys(location: tuple[str, ...]) -> list[str]:
    model: Any = Recipe
    for part in location:
        if part.isdigit():
            continue
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        model = _inner_model(field.annotation) if field else None
        if model is None:
            return []
    return ["extends", *model.model_fields] if model is Recipe else list(model.model_fields)


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _inner_model(argument)
        if found:
            return found
    return None


def _key_lines(path: Path) -> dict[tuple[str, ...], int]:
    """Returns the 1-based line of every key of a YAML file, by its path of keys."""
    lines: dict[tuple[str, ...], int] = {}

    def walk(node: Any, prefix: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                lines[(*prefix, key.value)] = key.start_mark.line + 1
                walk(value, (*prefix, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[(*prefix, str(index))] = value.start_mark.line + 1
                walk(value, (*prefix, str(index)))

    try:
        walk(yaml.compose(path.read_text("utf-8-sig"), Loader=_Loader), ())
    except (yaml.YAMLError, _RecipeProblem, OSError, UnicodeDecodeError):
        return {}
    return lines
