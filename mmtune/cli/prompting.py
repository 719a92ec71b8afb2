"""The command that searches a prompt."""

from __future__ import annotations

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
    resume: Resume = "auto",
    force: Force = False,
    dry_run: DryRun = False,
    limit: Limit = None,
    seed: Seed = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Searches for a better prompt with a frozen model: instructions/ to prompt/.

    Example: mmtune prompt recipes/prompt_blackbox.yaml --set prompt.method=gepa
    """
    from mmtune.stages.prompt import prompt as stage

    check_resume(resume)
    loaded = load(recipe, overrides, seed)
    result = stage(
        loaded, force=force, dry_run=dry_run, limit=limit, resume=resume, offline=offline, console=Talk(quiet)
    )
    finish("prompt", result, as_json)
