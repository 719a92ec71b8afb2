"""The command that makes a tuned model ready to serve."""

from __future__ import annotations

from mmtune.cli.options import DryRun, Force, Json, Offline, Quiet, RecipePath, Set, finish, load
from mmtune.talk import Talk


def export(
    recipe: RecipePath = None,
    overrides: Set = None,
    force: Force = False,
    dry_run: DryRun = False,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Base and adapter/ to exported/, one model folder. It is read back and compared with the tuned model.

    Example: mmtune export recipes/quickstart.yaml
    """
    from mmtune.stages.export import export as stage

    loaded = load(recipe, overrides, None)
    result = stage(loaded, force=force, dry_run=dry_run, offline=offline, console=Talk(quiet))
    finish("export", result, as_json)
