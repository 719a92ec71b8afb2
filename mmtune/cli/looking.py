"""The commands that show: recipes, stage folders, the machine, the keys of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmtune.cli.options import DryRun, Force, Json, finish
from mmtune.talk import Talk

_SECTION = "A section or key, such as finetune.lora, or a word of one, also of another trainer's; left out: all."


def init(
    name: Annotated[str | None, typer.Argument(help="Recipe to copy; left out: list them.")] = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """List the shipped recipes, or copy one into this folder.

    Example: mmtune init quickstart
    """
    from mmtune.stages.init import copy_recipe, list_recipes

    if name is None:
        recipes = list_recipes()
        if as_json:
            finish("init", {"recipes": recipes}, True)
        else:
            for item in recipes:
                print(f"{item['name']:24} {item['about']}")
            Talk().say("init: mmtune init NAME copies one; own_table and own_messages are for data of your own")
        return
    written = copy_recipe(name, Path.cwd(), force=force, dry_run=dry_run)
    if dry_run:
        Talk().say(f"init: would write {written}")
        finish("init", {"path": str(written), "dry_run": True}, as_json)
        return
    Talk().say(f"wrote {written}; next: see its first lines for the data that it takes, then mmtune run {written.name}")
    finish("init", {"path": str(written)}, as_json)


def show(
    path: Annotated[Path, typer.Argument(help="A stage folder, or a run_dir.")],
    row: Annotated[int, typer.Option("--row", min=0, help="Which row to show.")] = 0,
    split: Annotated[str | None, typer.Option("--split", help="Which split; default the first.")] = None,
    as_json: Json = False,
) -> None:
    """What is in a stage folder or a run. Manifest, counts, rejects and one row with its loss mask.

    Example: mmtune show runs/quickstart/tokens --row 3
    """
    from mmtune.stages.show import describe, render

    result = describe(path, row=row, split=split)
    if as_json:
        finish("show", result, True)
    else:
        print(render(result))


def doctor(as_json: Json = False) -> None:
    """Versions, devices, decoders and what is missing. It says how to install that.

    Example: mmtune doctor --json
    """
    from mmtune.stages.doctor import examine, render

    result = examine()
    if as_json:
        finish("doctor", result, True)
    else:
        print(render(result))


def keys(
    section: Annotated[str, typer.Argument(help=_SECTION)] = "",
    as_json: Annotated[bool, typer.Option("--json", help="The JSON Schema of a recipe, for editors.")] = False,
) -> None:
    """Every key of a recipe: type, default and meaning.

    Example: mmtune keys finetune
    """
    from mmtune.stages.keys import list_keys, render, schema

    if as_json:
        finish("keys", {"recipe": schema(section)}, True)
    else:
        print(render(list_keys(section)))
