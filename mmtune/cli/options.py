"""The options that commands share, and how each command begins and ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from mmtune.errors import RecipeError
from mmtune.talk import json_line

if TYPE_CHECKING:
    from mmtune.recipe import Recipe


def _go_offline(value: bool) -> bool:
    # The hub's library reads this once, when it is imported: before any stage is.
    if value:
        os.environ["HF_HUB_OFFLINE"] = "1"
    return value


RecipePath = Annotated[
    Path | None, typer.Argument(help="Recipe file; ./mmtune.yaml when left out.", show_default=False)
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key: a.b=value (repeatable).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, on failure too.")]
Force = Annotated[bool, typer.Option("--force", help="Redo, also when nothing changed.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, write nothing.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="At most this many rows.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Override the recipe's seed.")]
Offline = Annotated[bool, typer.Option("--offline", callback=_go_offline, help="Never reach for the network.")]
Resume = Annotated[str, typer.Option("--resume", help="auto goes on from the newest checkpoint; never.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings on stderr.")]


def load(recipe: Path | None, overrides: list[str] | None, seed: int | None) -> Recipe:
    """Returns the checked recipe: the file's, with ``--set`` and ``--seed`` over it."""
    # The schema takes a tenth of a second to build; `--help` does without it.
    from mmtune.recipe.text import load_recipe

    extra = [] if seed is None else [f"seed={seed}"]
    return load_recipe(recipe, [*(overrides or ()), *extra])


# Where documents go while a stage runs; None is stdout.
_DATA: ContextVar[IO[str] | None] = ContextVar("data", default=None)


def check_resume(resume: str) -> None:
    """Raises RecipeError when ``--resume`` is neither auto nor never."""
    if resume not in ("auto", "never"):
        raise RecipeError(f"--resume {resume!r}: expected auto or never", "leave it out to go on where a run stopped")


def keeping_stdout(command: Callable[..., None]) -> Callable[..., None]:
    """Returns a command of a stage that sends what libraries print to stderr: stdout carries its document alone."""

    @wraps(command)
    def run(*args: Any, **options: Any) -> None:
        token = _DATA.set(sys.stdout)
        try:
            with redirect_stdout(sys.stderr):
                command(*args, **options)
        finally:
            _DATA.reset(token)

    return run


def finish(command: str, result: dict[str, Any], as_json: bool) -> None:
    """Prints a command's result document on stdout where ``--json`` asked for it."""
    if as_json:
        print(json_line({"ok": True, "schema": f"mmtune.{command}/1", **result}), file=_DATA.get())
