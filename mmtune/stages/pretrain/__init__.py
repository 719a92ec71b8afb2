"""pretrain: start/ and tokens/ to base/. Wiring only; the objectives and the loop are in ``training``."""

from __future__ import annotations

import json
import shutil
from typing import Any

from mmtune.errors import IntegrityError, RecipeError
from mmtune.models.digest import weights_digest
from mmtune.recipe import Recipe
from mmtune.stages.pretrain.course import follow
from mmtune.stages.pretrain.preparation import Run, prepare
from mmtune.storage import Staging, foresee, open_stage, read_manifest
from mmtune.talk import Talk

# What every line of metrics has; the others are named by the objectives.
_USUAL = ("step", "loss", "val_loss", "learning_rate", "grad_norm", "rows_per_second", "tokens_per_second")
# Settings that change how a run is watched, not what it computes.
_FREE = ("build", "save_every", "keep", "log_every")


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
    start = read_manifest(recipe.run_dir / "start", made_by="pretrain")
    tokens = read_manifest(recipe.run_dir / "tokens", made_by="tokenize")
    made_for = str(tokens.facts.get("model", ""))
    if made_for != str(recipe.run_dir / "base"):
        raise IntegrityError(f"tokens/ was made for the model {made_for}", "run: mmtune tokenize", "other_model")
    config = {
        "pretrain": {**recipe.pretrain.model_dump(mode="json", exclude=set(_FREE)), "objectives": _weights(recipe)},
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
    staging = open_stage(target, **stage, force=force, on_change="refuse", say=console.say)
    if staging is None:
        return {"stage": "pretrain", "cached": True, "target": str(target), **read_manifest(target).facts}
    with staging:
        run = prepare(recipe, tokens, {"config": config, "tokens": tokens.hash}, limit, offline, console)
        outcome = follow(run, resume, console)
        return _publish(run, outcome, console, staging)


def _weights(recipe: Recipe) -> dict[str, float]:
    # One of weight 0 changes nothing, so it makes no other run.
    assert recipe.pretrain is not None
    return recipe.pretrain.weights


def _publish(run: Run, outcome: Any, console: Talk, staging: Staging) -> dict[str, Any]:
    from mmtune.models.objectives.adversarial import GameFacts, game_warnings
    from mmtune.models.towers import tower_table
    from mmtune.training.meter import shares

    run.learner.thaw()
    model = run.learner.model
    model.save_pretrained(str(staging.path))
    run.processor.save_pretrained(str(staging.path))
    (staging.path / "metrics.jsonl").write_text(outcome.metrics, "utf-8")
    lines = [json.loads(line) for line in outcome.metrics.splitlines()]
    last: dict[str, Any] = next((line for line in reversed(lines) if "loss" in line), {})
    facts = {
        "towers": {row.tower: {"state": row.state, "trainable": row.trainable} for row in tower_table(model)},
        "objectives": dict(run.learner.settings.weights),
        "steps": outcome.step,
        "loss": last.get("loss"),
        "val_loss": next((line["val_loss"] for line in reversed(lines) if "val_loss" in line), None),
        "last": {name: last[name] for name in sorted(last) if name not in (*_USUAL, "wait_share")},
        **shares(outcome.seconds),
        "media_root": run.tokens.facts.get("media_root"),
    }
    timings = {f"{name}_seconds": round(value, 3) for name, value in outcome.seconds.items()}
    staging.publish(rows={"train": int(run.train.plan.sizes.rows.sum())}, facts=facts, timings=timings)
    run.checkpoints.clear()
    if not any(run.checkpoints.folder.parent.iterdir()):
        shutil.rmtree(run.checkpoints.folder.parent)
    if "discriminator_accuracy" in last:
        prefix = "code_variance_"
        spread = {name.removeprefix(prefix): last[name] for name in last if name.startswith(prefix)}
        for warning in game_warnings(GameFacts(last["discriminator_accuracy"], last["game_value"], spread)):
            console.note(warning)
    losses = [f"{name} {facts[key]:.4f}" for name, key in (("loss", "loss"), ("val loss", "val_loss")) if facts[key]]
    parts = [f"{name} {value:.4f}" for name, value in facts["last"].items()]
    console.say(f"pretrain: wrote {staging.target} ({', '.join([*losses, *parts])})")
    return {"stage": "pretrain", "cached": False, "target": str(staging.target), **facts}
