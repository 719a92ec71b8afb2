"""init: list the shipped recipes, or copy one with its paths kept working."""

from __future__ import annotations

import difflib
import json
import re
from itertools import takewhile
from pathlib import Path

from mmtune.errors import RecipeError

_DATA = re.compile(r"(?<=[\s:{,])\.\./(data/[^\s,}]*)")
_RUNS = re.compile(r"(?<=[\s:{,])\.\./(?=runs/)")
_PLAIN = re.compile(r"[\w./~-]+")


def shipped_folder() -> Path:
    """Returns the folder that holds recipes/ and data/: the one inside the wheel, or the checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "shipped"
    return inside if inside.is_dir() else package.parent


def list_recipes() -> list[dict[str, str]]:
    """Returns name and first sentence of the description of every shipped recipe."""
    found = []
    for file in sorted((shipped_folder() / "recipes").glob("*.yaml")):
        found.append({"name": file.stem, "about": _first_sentence(file.read_text("utf-8"))})
    return found


def _first_sentence(text: str) -> str:
    head = takewhile(lambda line: line.startswith("#"), text.splitlines())
    about = takewhile(lambda words: not words.startswith("command:"), (line.lstrip("# ") for line in head))
    return re.split(r"(?<=\.)\s", " ".join(about), maxsplit=1)[0].strip()


def copy_recipe(name: str, target: Path, *, force: bool = False, dry_run: bool = False) -> Path:
    """Copies a shipped recipe into a folder and returns the new file, which a dry run only names.

    Paths of bundled data are written out in full, so the copy works from anywhere; what the
    run writes stays relative to the copy.

    Raises:
        RecipeError: There is no such recipe, or the file exists already.
    """
    names = [item["name"] for item in list_recipes()]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise RecipeError(
            f"there is no recipe named {name!r}",
            f"did you mean {near[0]}?" if near else f"there are: {', '.join(names)}",
            "no_recipe",
        )
    written = target / f"{name}.yaml"
    if written.exists() and not force:
        raise RecipeError(f"{written} is there already", "use --force to replace it", "file_exists")
    if dry_run:
        return written
    folder = shipped_folder()
    text = (folder / "recipes" / f"{name}.yaml").read_text("utf-8")
    text = _DATA.sub(lambda match: _yaml_text(f"{folder}/{match[1]}"), text)
    text = _RUNS.sub("", text)
    written.write_text(text, "utf-8")
    return written


def _yaml_text(path: str) -> str:
    return path if _PLAIN.fullmatch(path) else json.dumps(path, ensure_ascii=False)
