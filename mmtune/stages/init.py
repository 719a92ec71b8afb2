"""init: list the shipped recipes, or copy one with its paths kept working."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from mmtune.errors import RecipeError


def recipe_folder() -> Path:
    """Returns the folder of shipped recipes: the checkout's, or the copy inside the wheel."""
    package = Path(__file__).resolve().parent.parent
    checkout = package.parent / "recipes"
    return checkout if checkout.is_dir() else package / "recipes"


def list_recipes() -> list[dict[str, str]]:
    """Returns name and first line of the description of every shipped recipe."""
    found = []
    for file in sorted(recipe_folder().glob("*.yaml")):
        first = file.read_text("utf-8").splitlines()[0].lstrip("# ").strip()
        found.append({"name": file.stem, "about": first})
    return found


def copy_recipe(name: str, target: Path, *, force: bool = False) -> Path:
    """Copies a shipped recipe into a folder and returns the new file.

    Relative paths of the recipe are written out in full, so the copy works from anywhere;
    ``run_dir`` stays relative to the copy.

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
    folder = recipe_folder()
    text = (folder / f"{name}.yaml").read_text("utf-8")
    text = re.sub(r"(?<=[\s:{,])\.\./(?=data/)", f"{folder.parent}/", text)
    text = re.sub(r"(?m)^run_dir: \.\./", "run_dir: ", text)
    text = re.sub(r"(?m)^extends: (?!/)", f"extends: {folder}/", text)
    written.write_text(text, "utf-8")
    return written
