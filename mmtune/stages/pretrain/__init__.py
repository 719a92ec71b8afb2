"""pretrain: start/ and tokens/ to base/. Wiring only; the objectives and the loop are in ``training``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext, suppress
from typing import Any

from mmtune.errors import IntegrityError, RecipeError
from mmtune.models.digest import weights_digest
from mmtune.recipe import Recipe
from mmtune.stages.pretrain.course import follow
from mmtune.stages.pretrain.preparation import Run, measure, prepare
from mmtune.storage import Staging, foresee, is_made, open_stage, read_manifest
from mmtune.talk import Talk
from mmtune.training import launch as launching
from mmtune.training.checkpoints import CheckpointFolder
from mmtune.training.launch import is_launched, is_main

__all__ = ["is_launched", "is_main", "launch", "pretrain"]

# What every line of metrics has; the others are named by the objectives.
_USUAL = (
    "step",
    "loss",
    "val_loss",
    "learning_rate",
    "grad_norm",
    "rows_per_second",
    "tokens_per_second",
    "wait_share",
)
# Settings that change how a run is watched, not what it computes.
_FREE = ("save_every", "keep", "log_every")


def pretrain(
    recipe: Recipe,
    *,
    force: bool = False,
    dry_run: bool = False,
    limit: int | None = None,
    resume: str = "auto",
    offline: bool = False,
    console: Talk,
) -> dict[str, Any]:
    """Trains the parts in start/ on tokens/train and writes base/; returns the result document.

    Raises:
        DataError: start/ or tokens/ is missing, or an objective has no row to learn from.
        IntegrityError: base/ or its checkpoints belong to other settings.
        DivergedError: Loss or gradient is not finite.
        Interrupted: A signal came; the state is saved.
    """
    if recipe.pretrain is None:
        raise RecipeError("the recipe has no `pretrain` section", "add one: mmtune keys pretrain")
    if is_launched():
        launching.end_with(os.getppid())
    start = read_manifest(recipe.run_dir / "start", made_by="pretrain")
    tokens = read_manifest(recipe.run_dir / "tokens", made_by="tokenize")
    made_for = str(tokens.facts.get("model", ""))
    if made_for != str(recipe.run_dir / "base"):
        raise IntegrityError(f"tokens/ was made for the model {made_for}", "run: mmtune tokenize", "other_model")
    config = {
        "pretrain": {**recipe.pretrain.model_dump(mode="json", exclude=set(_FREE)), "objectives": _weights(recipe)},
        "attn": recipe.model.attn if recipe.model else "auto",
        "seed": recipe.seed,
        "limit": limit,
        "weights": weights_digest(str(recipe.run_dir / "start"), offline=offline),
    }
    target = recipe.run_dir / "base"
    parents = {"start": start.hash, "tokens": tokens.hash}
    stage: dict[str, Any] = {"stage": "pretrain", "config": config, "parents": parents}
    if dry_run:
        console.say(foresee(target, **stage, force=force, on_change="refuse"))
        return {"stage": "pretrain", "dry_run": True, "target": str(target), "config": config, "rows": tokens.rows}
    staging: Staging | None = None
    if is_main():
        staging = open_stage(target, **stage, force=force, on_change="refuse", say=console.say)
    if staging is None and (is_main() or (not force and is_made(target, config, parents))):
        facts = read_manifest(target).facts
        checkpoints = CheckpointFolder(recipe.run_dir / "checkpoints" / "pretrain", 1, "pretrain")
        if redo := checkpoints.stopped_redo(facts["steps"]):
            console.note(redo)
        return {"stage": "pretrain", "cached": True, "target": str(target), **facts}
    with staging or nullcontext(), ExitStack() as stack:
        # torch is imported in here: an interrupt meanwhile leaves no folder aside.
        from mmtune.training.ranks import meeting

        stack.enter_context(meeting("training"))
        run = prepare(recipe, tokens, {"config": config, **parents}, limit, offline, console)
        outcome = follow(run, resume, console)
        if staging is None:
            return {"stage": "pretrain", "rank": run.accelerator.process_index}
        return _publish(run, outcome, console, staging)


def _weights(recipe: Recipe) -> dict[str, float]:
    # One of weight 0 changes nothing, so it makes no other run.
    assert recipe.pretrain is not None
    return recipe.pretrain.weights


def _publish(run: Run, outcome: Any, console: Talk, staging: Staging) -> dict[str, Any]:
    from mmtune.models.save import save_model
    from mmtune.models.towers import tower_facts
    from mmtune.training.heads import save_heads
    from mmtune.training.meter import shares

    run.learner.thaw()
    model = run.learner.model
    save_model(model, staging.path)
    # By the standard of the finished model a row has a code without its batch.
    measure(run.learner, run.train.batches, run.train.plan, run.accelerator)
    save_heads(run.learner, staging.path)
    run.processor.save_pretrained(str(staging.path))
    (staging.path / "metrics.jsonl").write_text(outcome.metrics, "utf-8")
    lines = [json.loads(line) for line in outcome.metrics.splitlines()]
    held_out: dict[str, Any] = next((line for line in reversed(lines) if "val_loss" in line), {})
    last: dict[str, Any] = next((line for line in reversed(lines) if "loss" in line), {})
    facts = {
        "towers": tower_facts(model),
        "objectives": dict(run.learner.settings.weights),
        "steps": outcome.step,
        "loss": last.get("loss"),
        "val_loss": held_out.get("val_loss"),
        "last": _own_of(last, held_out=False),
        "held_out": _own_of(held_out, held_out=True),
        **shares(outcome.seconds),
        **outcome.teamwork,
        "media_root": run.tokens.facts.get("media_root"),
    }
    timings = {f"{name}_seconds": round(value, 3) for name, value in outcome.seconds.items()}
    staging.publish(rows={"train": int(run.train.plan.sizes.rows.sum())}, facts=facts, timings=timings)
    run.checkpoints.clear()
    # Others may stand beside them.
    with suppress(OSError):
        run.checkpoints.folder.parent.rmdir()
    for warning in _warnings(last):
        console.note(warning)
    _show_parts(facts, console)
    losses = [f"{name} {facts[key]:.4f}" for name, key in (("loss", "loss"), ("val loss", "val_loss")) if facts[key]]
    console.say(f"pretrain: wrote {staging.target} ({', '.join(losses)})")
    return {"stage": "pretrain", "cached": False, "target": str(staging.target), **facts}


def _show_parts(facts: Mapping[str, Any], console: Talk) -> None:
    """Prints what the objectives say of the last logged step and of held-out rows, side by side."""
    seen, kept = facts["last"], facts["held_out"]
    names = sorted({*seen, *kept})
    rows = [(name, *(f"{one[name]:.4f}" if name in one else "" for one in (seen, kept))) for name in names]
    if rows:
        console.table("what the objectives say", ("what", "last step", "held-out rows"), rows)


def _own_of(line: dict[str, Any], *, held_out: bool) -> dict[str, Any]:
    """Returns what the objectives say in a line of metrics: of training steps, or of held-out rows."""
    own = {name: value for name, value in sorted(line.items()) if name not in _USUAL}
    return {name.removeprefix("val_"): own[name] for name in own if name.startswith("val_") == held_out}


def _warnings(last: dict[str, Any]) -> list[str]:
    """Returns signs of an adversarial game gone wrong in the last line of metrics."""
    from mmtune.models.objectives.adversarial import GameFacts, game_warnings

    if "discriminator_accuracy" not in last:
        return []
    spread = {
        prefix + name.removeprefix(f"{kind}_variance_"): last[name]
        for kind, prefix in (("code", ""), ("filled", "filled-in "))
        for name in last
        if name.startswith(f"{kind}_variance_")
    }
    return game_warnings(GameFacts(last["discriminator_accuracy"], last["game_value"], spread))


def launch(arguments: list[str], processes: int, *, cpu: bool, console: Talk) -> None:
    """Runs the same command on several processes of this machine.

    Raises:
        MmtuneError: What the first process to fail said.
    """
    launching.launch("pretrain", arguments, processes, cpu=cpu, say=console.say)
