"""The commands that train: pretrain and finetune."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

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
from mmtune.errors import RecipeError
from mmtune.talk import Talk

Gpus = Annotated[int | None, typer.Option("--gpus", min=1, help="Train on this many GPUs of this machine.")]
CpuProcesses = Annotated[
    int | None, typer.Option("--cpu-processes", min=1, help="Train on this many CPU processes (gloo), on no GPU.")
]


def pretrain(
    recipe: RecipePath = None,
    overrides: Set = None,
    gpus: Gpus = None,
    cpu_processes: CpuProcesses = None,
    resume: Resume = "auto",
    force: Force = False,
    dry_run: DryRun = False,
    limit: Limit = None,
    seed: Seed = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Encoders and a language model to base/. They are joined and trained on instructions/, with exact resume.

    Example: mmtune pretrain recipes/represent.yaml
    """
    from mmtune.order import pretrain_stages, run_stages
    from mmtune.stages import pretrain as stage

    check_resume(resume)
    loaded = load(recipe, overrides, seed)
    processes, console = gpus or cpu_processes or 1, Talk(quiet or not stage.is_main())
    several = processes > 1 and not stage.is_launched() and not dry_run
    results: dict[str, Any] = {}
    # One process alone joins the parts and tokenizes.
    wanted = ("pretrain",) if stage.is_launched() else ("assemble", "tokenize", *(() if several else ("pretrain",)))
    for step in pretrain_stages(loaded, limit, resume, offline, wanted):
        again = force and step[0] == "pretrain"
        results |= run_stages(loaded, iter([step]), force=again, dry_run=dry_run, console=console)
    if several:
        cpu = gpus is None and cpu_processes is not None
        stage.launch(sys.argv[1:], processes, cpu=cpu, console=console)
    elif stage.is_main():
        finish("pretrain", results.get("pretrain", {"stage": "pretrain", "dry_run": True}), as_json)


def finetune(
    recipe: RecipePath = None,
    overrides: Set = None,
    gpus: Gpus = None,
    cpu_processes: CpuProcesses = None,
    nodes: Annotated[
        int, typer.Option("--nodes", min=1, help="Machines; run the same command on each, on a shared run_dir.")
    ] = 1,
    rendezvous: Annotated[
        str | None, typer.Option("--rendezvous", help="HOST:PORT where the machines meet, with --nodes.")
    ] = None,
    resume: Resume = "auto",
    force: Force = False,
    dry_run: DryRun = False,
    limit: Limit = None,
    seed: Seed = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """tokens/ to adapter/. LoRA, full tuning or soft prompts, with exact resume.

    Example: mmtune finetune recipes/quickstart.yaml --gpus 4
    """
    from mmtune.stages import finetune as stage

    check_resume(resume)
    if gpus is not None and cpu_processes is not None:
        raise RecipeError("--gpus and --cpu-processes say different things", "give one of the two", "usage")
    loaded = load(recipe, overrides, seed)
    processes = gpus or cpu_processes or 1
    console = Talk(quiet or not stage.is_main())
    if processes * nodes > 1 and not stage.is_launched() and not dry_run:
        stage.launch(
            sys.argv[1:], processes, cpu=cpu_processes is not None, nodes=nodes, rendezvous=rendezvous, console=console
        )
        return
    if gpus is not None and not stage.is_launched():
        stage.need_gpus(gpus)
    if cpu_processes is not None:
        os.environ.update(stage.CPU_ONLY)
    result = stage.finetune(
        loaded, force=force, dry_run=dry_run, limit=limit, resume=resume, offline=offline, console=console
    )
    if stage.is_main():
        finish("finetune", result, as_json)
