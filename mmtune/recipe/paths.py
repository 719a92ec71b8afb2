"""Which keys of a recipe are paths, and what a relative one is relative to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmtune.errors import RecipeError
from mmtune.recipe.build import TEMPLATE_DRAWS
from mmtune.recipe.extract import encoder_paths
from mmtune.recipe.pretrain import part_paths

PATH_KEYS: dict[str, tuple[str, ...]] = {
    "": ("run_dir",),
    "model": ("path",),
    "sources": ("path", "questions", "annotations", "images", "audios", "videos", "templates"),
    "build": ("templates", "prompt"),
    "extract.encoders": ("image", "audio", "text", "behaviour"),
    "eval.ensemble": ("adapters",),
}
"""Keys whose relative paths are relative to the recipe's folder. A ``model.path`` or an ``hf``
``path`` that is no existing folder there and can be a hub id, ``name`` or ``org/name``, stays as it is."""
_OWN_FOLDER = "data/"
"""Where the bundled models are: what stands there is no organisation of the hub."""


def resolve_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns recipe values with relative paths made absolute against the recipe's folder."""
    out = dict(values)
    if isinstance(out.get("run_dir"), str):
        out["run_dir"] = str(_absolute(out["run_dir"], folder))
    model = out.get("model")
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        out["model"] = {**model, "path": _local_or_hub(model["path"], folder)}
    build = out.get("build")
    if isinstance(build, dict):
        places = {"templates": _template_file, "prompt": lambda value, folder: str(_absolute(value, folder))}
        found = {key: place(build[key], folder) for key, place in places.items() if isinstance(build.get(key), str)}
        out["build"] = {**build, **found}
    if "extract" in out:
        out["extract"] = encoder_paths(out["extract"], lambda value: _local_or_hub(value, folder))
    if isinstance(out.get("eval"), dict):
        out["eval"] = _with_adapters(out["eval"], folder)
    if "pretrain" in out:
        out["pretrain"] = part_paths(out["pretrain"], lambda value: _local_or_hub(value, folder))
    sources = out.get("sources")
    if isinstance(sources, list):
        out["sources"] = [_resolve_source(source, folder) if isinstance(source, dict) else source for source in sources]
    return out


def _with_adapters(section: dict[str, Any], folder: Path) -> dict[str, Any]:
    ensemble = section.get("ensemble")
    if not isinstance(ensemble, dict) or not isinstance(named := ensemble.get("adapters"), list | str):
        return section
    names = [named] if isinstance(named, str) else named
    found = [str(_absolute(one, folder)) if isinstance(one, str) else one for one in names]
    return {**section, "ensemble": {**ensemble, "adapters": found}}


def _resolve_source(source: dict[str, Any], folder: Path) -> dict[str, Any]:
    resolved = dict(source)
    for key in PATH_KEYS["sources"]:
        value = resolved.get(key)
        if key == "templates" and isinstance(value, str):
            resolved[key] = _template_file(value, folder)
        elif isinstance(value, str):
            hub = key == "path" and source.get("reader") == "hf"
            resolved[key] = _local_or_hub(value, folder) if hub else str(_absolute(value, folder))
    return resolved


def _template_file(value: str, folder: Path) -> str:
    return value if value in TEMPLATE_DRAWS else str(_absolute(value, folder))


def _absolute(value: str, folder: Path) -> Path:
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:
        raise RecipeError(f"no home folder for {value!r}", "write the path out") from error
    try:
        found = path if path.is_absolute() else (folder / path).resolve()
        # Arrow, and every manifest, wants names that are text.
        str(found).encode("utf-8")
    except (OSError, RuntimeError, ValueError) as error:
        # A loop of links is a RuntimeError of pathlib, a NUL and what is not UTF-8 a ValueError.
        raise RecipeError(
            f"{value!r} is no path that can be followed",
            f"check {str(folder)!r} for loops of links and names that are not UTF-8",
        ) from error
    return found


def _local_or_hub(value: str, folder: Path) -> str:
    local = _absolute(value, folder)
    no_hub_id = value.startswith((".", "/", "~", _OWN_FOLDER)) or value.endswith("/") or value.count("/") > 1
    return str(local) if no_hub_id or local.exists() else value
