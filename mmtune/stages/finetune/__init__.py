"""finetune: tokens/ to adapter/. Wiring only; the loop is in ``training``."""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import ExitStack, nullcontext
from typing import Any

from mmtune.errors import IntegrityError, RecipeError
from mmtune.models.digest import weights_digest
from mmtune.prompts.wordings import WORDINGS
from mmtune.recipe import Finetune, Recipe
from mmtune.stages.finetune.course import follow
from mmtune.stages.finetune.preparation import SPREAD, Run, prepare
from mmtune.storage import Manifest, Staging, foresee, is_finished, is_made, open_stage, read_manifest
from mmtune.talk import Talk
from mmtune.training import launch as launching
from mmtune.training.checkpoints import CheckpointFolder
from mmtune.training.launch import CPU_ONLY, is_launched, is_main, need_gpus

__all__ = ["CPU_ONLY", "finetune", "is_launched", "is_main", "launch", "need_gpus"]

# Settings that change how a run is watched, not what it computes.
_WATCHED = ("save_every", "keep", "log_every", "trackers", "workers", "rank_timeout_seconds", "pixels_gib")
_FREE = (*_WATCHED, *SPREAD)


def finetune(
    recipe: Recipe,
    *,
    force: bool = False,
    dry_run: bool = False,
    limit: int | None = None,
    resume: str = "auto",
    offline: bool = False,
    console: Talk,
) -> dict[str, Any]:
    """Tunes the model on tokens/train and writes adapter/; returns the result document.

    Raises:
        DataError: tokens/ is missing or empty.
        IntegrityError: adapter/ or its checkpoints belong to other settings, or tokens/ to other rows.
        DivergedError: Loss or gradient is not finite.
        Interrupted: A signal came; the state is saved.
    """
    if is_launched():
        launching.end_with(os.getppid())
    settings = recipe.finetune or Finetune()
    tokens = read_manifest(recipe.run_dir / "tokens", made_by="tokenize")
    path = model_path(recipe, tokens)
    config, parents = _config(recipe, settings, path, limit, offline), {"tokens": tokens.hash}
    target = recipe.run_dir / "adapter"
    made_of: Any = {"stage": "finetune", "config": config, "parents": parents, "force": force, "on_change": "refuse"}
    if dry_run:
        console.say(foresee(target, **made_of))
        return {"stage": "finetune", "dry_run": True, "target": str(target), "config": config, "rows": tokens.rows}
    _check_rows(recipe, tokens)
    staging: Staging | None = open_stage(target, **made_of) if is_main() else None
    if staging is None and (is_main() or (not force and is_made(target, config, parents))):
        console.say(f"finetune: {target} is up to date (same settings, same tokens); nothing to do")
        facts = read_manifest(target).facts
        if redo := CheckpointFolder(recipe.run_dir / "checkpoints" / "finetune", 1).stopped_redo(facts["steps"]):
            console.note(redo)
        return {"stage": "finetune", "cached": True, "target": str(target), **facts}
    with staging or nullcontext(), ExitStack() as stack:
        # torch is imported in here: an interrupt meanwhile leaves no folder aside.
        from mmtune.models.adapter import whole_state
        from mmtune.models.left_out import bring_back
        from mmtune.training.ranks import meeting

        stack.enter_context(meeting("training"))
        run = prepare(
            recipe, settings, tokens, path, {"config": config, "tokens": tokens.hash}, limit, resume, offline, console
        )
        outcome = follow(run, resume, console)
        if settings.method == "full" and staging is not None:
            bring_back(run.model, run.load)
        state = whole_state(run.model)
        if staging is None:
            return {"stage": "finetune", "rank": run.accelerator.process_index}
        return _publish(run, outcome, state, console, staging)


def _config(recipe: Recipe, settings: Finetune, path: str, limit: int | None, offline: bool) -> dict[str, Any]:
    """Returns what adapter/ depends on besides tokens/."""
    revision = recipe.model.revision if recipe.model else None
    return {
        "finetune": settings.model_dump(mode="json", exclude=set(_FREE)),
        "model": path,
        "revision": revision,
        "attn": recipe.model.attn if recipe.model else "auto",
        "seed": recipe.seed,
        "limit": limit,
        "weights": weights_digest(path, revision=revision, offline=offline),
    }


def _check_rows(recipe: Recipe, tokens: Manifest) -> None:
    """Raises IntegrityError where instructions/ was made again since tokens/ was; where it is gone tokens/ will do."""
    folder = recipe.run_dir / "instructions"
    if is_finished(folder) and tokens.parents.get("instructions") != read_manifest(folder).hash_without(WORDINGS):
        raise IntegrityError(
            "tokens/ was made of other rows than instructions/ holds", "run: mmtune tokenize", "other_rows"
        )


def model_path(recipe: Recipe, tokens: Manifest) -> str:
    """Returns the model that tokens/ was made for, refusing another one in the recipe."""
    made_for = str(tokens.facts.get("model", ""))
    if recipe.model is not None and made_for and recipe.model.path != made_for:
        raise IntegrityError(
            f"tokens/ was made for the model {made_for}, the recipe asks for {recipe.model.path}",
            "run: mmtune tokenize",
            "other_model",
        )
    if not made_for and recipe.model is None:
        raise RecipeError("the recipe names no model", "add `model: {path: ...}`")
    return made_for or str(recipe.model.path if recipe.model else "")


def _publish(run: Run, outcome: Any, state: Any, console: Talk, staging: Staging) -> dict[str, Any]:
    from mmtune.encoding.processor import tokenizer_of
    from mmtune.evaluation.generation import stop_ids
    from mmtune.models.adapter import save_tuned
    from mmtune.models.towers import tower_facts
    from mmtune.training.meter import shares

    towers = tower_facts(run.model)
    save_tuned(run.model, staging.path, state)
    run.processor.save_pretrained(str(staging.path))
    (staging.path / "metrics.jsonl").write_text(outcome.metrics, "utf-8")
    rows = [json.loads(line) for line in outcome.metrics.splitlines()]
    last: dict[str, Any] = next((row for row in reversed(rows) if "loss" in row), {})
    facts = {
        "model": run.tokens.facts.get("model"),
        "method": run.settings.method,
        "batches": run.identity["batches"],
        "towers": towers,
        "steps": outcome.step,
        "loss": last.get("loss"),
        **_auxiliary(run.model, last),
        "val_loss": next((row["val_loss"] for row in reversed(rows) if "val_loss" in row), None),
        # A run that had only to publish took no step to have shares of.
        **(shares(outcome.seconds) if outcome.rows else {}),
        **outcome.teamwork,
        "media_root": run.tokens.facts.get("media_root"),
        "eos_token_ids": stop_ids(run.model, tokenizer_of(run.processor)),
    }
    timings = {f"{name}_seconds": round(value, 3) for name, value in outcome.seconds.items()}
    staging.publish(rows={"train": int(run.train.plan.sizes.rows.sum())}, facts=facts, timings=timings)
    run.checkpoints.clear()
    if not any(run.checkpoints.folder.parent.iterdir()):
        shutil.rmtree(run.checkpoints.folder.parent)
    losses = [f"{name} {facts[key]:.4f}" for name, key in (("loss", "loss"), ("val loss", "val_loss")) if facts[key]]
    console.say(f"finetune: wrote {staging.target} ({', '.join(losses) or 'no loss logged'})")
    return {"stage": "finetune", "cached": False, "target": str(staging.target), **facts}


def _auxiliary(model: Any, last: dict[str, Any]) -> dict[str, Any]:
    """Returns share and parts of the last training loss where passes of a fusion also learn by their own answers."""
    from mmtune.models.composite.scores import auxiliary_share

    share = auxiliary_share(model)
    parts = {name: value for name, value in last.items() if name.startswith(("loss_mixture", "loss_alone_"))}
    return {"auxiliary_loss": share, "loss_parts": parts} if share and parts else {}


def launch(
    arguments: list[str],
    processes: int,
    *,
    cpu: bool,
    nodes: int = 1,
    rendezvous: str | None = None,
    console: Talk,
) -> None:
    """Runs the same command on several processes, of several machines where asked.

    Raises:
        RecipeError: Several nodes without a rendezvous.
        MmtuneError: What the first process to fail said.
    """
    if nodes > 1 and not re.fullmatch(r"[^\s:]+:\d{1,5}", rendezvous or ""):
        raise RecipeError(
            f"--nodes {nodes} needs the place where the machines meet: --rendezvous HOST:PORT",
            "give the name of one of them, the same on all, and a free port",
            "no_rendezvous",
        )
    machines = launching.Nodes(nodes, rendezvous or "", f"mmtune-{rendezvous}")
    launching.launch("finetune", arguments, processes, cpu=cpu, say=console.say, nodes=machines)
