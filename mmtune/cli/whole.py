"""The command that runs every stage of a recipe."""

from __future__ import annotations

from mmtune.cli.options import DryRun, Force, Json, Limit, Offline, Quiet, RecipePath, Seed, Set, finish, load
from mmtune.cli.training import CpuProcesses, Gpus, check_processes, on_processes
from mmtune.talk import Talk


def run(
    recipe: RecipePath = None,
    overrides: Set = None,
    gpus: Gpus = None,
    cpu_processes: CpuProcesses = None,
    force: Force = False,
    dry_run: DryRun = False,
    limit: Limit = None,
    seed: Seed = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Every stage that the recipe names, in order. Finished ones are skipped.

    Example: mmtune run recipes/quickstart.yaml
    """
    from mmtune.order import early_end, run_stages, stages_of

    loaded = load(recipe, overrides, seed)
    processes = check_processes(gpus, cpu_processes)
    stages = stages_of(loaded, limit, offline)
    console = Talk(quiet)
    if processes > 1 and not dry_run:
        same = [str(recipe)] if recipe else []
        same += [part for value in overrides or () for part in ("--set", value)]
        same += ["--seed", str(seed)] if seed is not None else []
        same += [flag for flag, wanted in (("--force", force), ("--offline", offline), ("--quiet", quiet)) if wanted]
        stages = on_processes(stages, processes, same, cpu=cpu_processes is not None, force=force)
    results = run_stages(loaded, stages, force=force, dry_run=dry_run, console=console)
    if ended := early_end(loaded):
        console.note(ended)
    finish("run", {"run_dir": str(loaded.run_dir), "stages": results}, as_json)
