"""The command that searches a prompt."""

from __future__ import annotations

from typing import Annotated

import typer

from mmtune.cli.options import (
    DryRun,
    Force,
    Json,
    Limit,
    Offline,
    Quiet,
    RecipePath,
    Resume,
    Seed,
    Set,
    check_resume,
    finish,
    load,
)
from mmtune.talk import Talk


def prompt(
    recipe: RecipePath = None,
    overrides: Set = None,
    method: Annotated[
        str | None, typer.Option("--method", help="Override prompt.method: ape, opro, mipro, ...")
    ] = None,
    budget: Annotated[int | None, typer.Option("--budget", min=1, help="Override prompt.budget: model calls.")] = None,
    resume: Resume = "auto",
    force: Force = False,
    dry_run: DryRun = False,
    limit: Limit = None,
    seed: Seed = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """A better prompt to prompt/. The search asks a frozen model rows of instructions/.

    Example: mmtune prompt recipes/prompt_blackbox.yaml --method gepa
    """
    from mmtune.stages.prompt import prompt as stage

    check_resume(resume)
    own = {"prompt.method": method, "prompt.budget": budget}
    changes = [f"{key}={value}" for key, value in own.items() if value is not None]
    loaded = load(recipe, [*(overrides or ()), *changes], seed)
    result = stage(
        loaded, force=force, dry_run=dry_run, limit=limit, resume=resume, offline=offline, console=Talk(quiet)
    )
    finish("prompt", result, as_json)
