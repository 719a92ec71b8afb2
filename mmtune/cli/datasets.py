"""The commands that make datasets: raw sources to instructions, features and tokens."""

from __future__ import annotations

from mmtune.cli.options import DryRun, Force, Json, Limit, Offline, Quiet, RecipePath, Seed, Set, finish, load
from mmtune.talk import Talk


def build_data(
    recipe: RecipePath = None,
    overrides: Set = None,
    force: Force = False,
    dry_run: DryRun = False,
    limit: Limit = None,
    seed: Seed = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Raw sources to instructions/.

    Example: mmtune build-data recipes/quickstart.yaml --limit 100
    """
    from mmtune.stages.build_data import build_data as stage

    loaded = load(recipe, overrides, seed)
    result = stage(loaded, force=force, dry_run=dry_run, limit=limit, console=Talk(quiet))
    finish("build-data", result, as_json)


def extract(
    recipe: RecipePath = None,
    overrides: Set = None,
    force: Force = False,
    dry_run: DryRun = False,
    limit: Limit = None,
    seed: Seed = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Media, texts and histories to features/. Frozen encoders make them, beside a search index.

    Example: mmtune extract recipes/features.yaml --limit 100
    """
    from mmtune.stages.extract import extract as stage

    loaded = load(recipe, overrides, seed)
    result = stage(loaded, force=force, dry_run=dry_run, limit=limit, offline=offline, console=Talk(quiet))
    finish("extract", result, as_json)


def tokenize(
    recipe: RecipePath = None,
    overrides: Set = None,
    force: Force = False,
    dry_run: DryRun = False,
    limit: Limit = None,
    seed: Seed = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """instructions/ to tokens/. Ids, loss mask and media spans, without decoding a pixel.

    Example: mmtune tokenize recipes/quickstart.yaml
    """
    from mmtune.stages.tokenize import tokenize as stage

    loaded = load(recipe, overrides, seed)
    console = Talk(quiet)
    if loaded.pretrain is not None:
        from mmtune.order import pretrain_stages, run_stages

        # The processor comes with the parts that pretrain joins.
        parts = pretrain_stages(loaded, limit, "auto", offline, ("assemble",))
        run_stages(loaded, parts, force=False, dry_run=dry_run, console=console)
    result = stage(loaded, force=force, dry_run=dry_run, limit=limit, offline=offline, console=console)
    finish("tokenize", result, as_json)
