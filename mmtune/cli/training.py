"""The commands that train: pretrain and finetune."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from mmtune.order import Stage

Gpus = Annotated[int | None, typer.Option("--gpus", min=1, help="Train on this many GPUs of this machine.")]
CpuProcesses = Annotated[
    int | None, typer.Option("--cpu-processes", min=1, help="Train on this many CPU processes (gloo), on no GPU.")
]

_MADE = {"pretrain": "base", "finetune": "adapter"}
"""Stages that train, and what they make."""


def check_processes(gpus: int | None, cpu_processes: int | None, nodes: int = 1) -> int:
    """Returns how many processes train, each with its GPU if it is to have one; with ``--cpu-processes`` there is none.

    Of several nodes the launcher looks at the GPUs, once it knows where they meet.

    Raises:
        RecipeError: Both kinds are asked for.
        CapabilityError: There are fewer GPUs than asked for.
    """
    from mmtune.stages.finetune import CPU_ONLY, is_launched, need_gpus

    if gpus is not None and cpu_processes is not None:
        raise RecipeError("--gpus and --cpu-processes say different things", "give one of the two", "usage")
    if gpus is not None and nodes == 1 and not is_launched():
        need_gpus(gpus)
    if cpu_processes is not None:
        os.environ.update(CPU_ONLY)
    return gpus or cpu_processes or 1


def on_processes(
    stages: Iterator[Stage], processes: int, arguments: list[str], *, cpu: bool, force: bool
) -> Iterator[Stage]:
    """Yields the stages of a run, of which those that train run as commands of their own on several processes.

    What is finished already is looked at here: no process starts for it.

    Args:
        stages: From ``stages_of``.
        processes: How many train.
        arguments: Of such a command, behind its name.
        cpu: They are CPU processes.
        force: Redo what is finished.
    """

    def spread(name: str, alone: Callable[..., dict[str, Any]], recipe: Any, **options: Any) -> dict[str, Any]:
        from mmtune.stages import finetune, pretrain
        from mmtune.storage import is_finished, read_manifest

        target = recipe.run_dir / _MADE[name]
        if is_finished(target) and not force:
            return alone(recipe, **options)
        own = [name, *arguments, "--cpu-processes" if cpu else "--gpus", str(processes)]
        stage = {"pretrain": pretrain, "finetune": finetune}[name]
        stage.launch(own, processes, cpu=cpu, console=options["console"])
        return {"stage": name, "cached": False, "target": str(target), **read_manifest(target).facts}

    for name, stage, options in stages:
        yield name, partial(spread, name, stage) if name in _MADE else stage, options


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
    processes, console = check_processes(gpus, cpu_processes), Talk(quiet or not stage.is_main())
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
    loaded = load(recipe, overrides, seed)
    processes = check_processes(gpus, cpu_processes, nodes)
    console = Talk(quiet or not stage.is_main())
    if processes * nodes > 1 and not stage.is_launched() and not dry_run:
        stage.launch(
            sys.argv[1:], processes, cpu=cpu_processes is not None, nodes=nodes, rendezvous=rendezvous, console=console
        )
        return
    result = stage.finetune(
        loaded, force=force, dry_run=dry_run, limit=limit, resume=resume, offline=offline, console=console
    )
    if stage.is_main():
        finish("finetune", result, as_json)
