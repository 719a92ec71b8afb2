"""finetune: tokens/ to adapter/. Wiring only; the loop is in ``training``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmtune.errors import DataError, IntegrityError, Interrupted, MmtuneError, RecipeError
from mmtune.recipe import Finetune, Recipe
from mmtune.storage import Manifest, Staging, is_finished, open_split, open_stage, read_manifest
from mmtune.talk import Talk
from mmtune.training import launch as launching
from mmtune.training.launch import is_launched, is_main

__all__ = ["finetune", "is_launched", "is_main", "launch"]

# Settings that change how a run is watched, not what it computes.
_FREE = ("save_every", "keep", "log_every", "trackers", "workers", "rank_timeout_seconds")


@dataclass
class _Run:
    """Everything one process needs for training."""

    recipe: Recipe
    settings: Finetune
    tokens: Manifest
    model: Any
    optimizer: Any
    accelerator: Any
    train: Any
    split: Any
    validate: Any
    checkpoints: Any
    identity: dict[str, Any]
    processor: Any


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
        IntegrityError: adapter/ or its checkpoints belong to other settings.
        DivergedError: Loss or gradient is not finite.
        Interrupted: A signal came; the state is saved.
    """
    try:
        return _finetune(recipe, force, dry_run, limit, resume, offline, console)
    except MmtuneError as error:
        launching.leave_exit_code(error.exit_code)
        raise


def _finetune(
    recipe: Recipe, force: bool, dry_run: bool, limit: int | None, resume: str, offline: bool, console: Talk
) -> dict[str, Any]:
    settings = recipe.finetune or Finetune()
    tokens = read_manifest(recipe.run_dir / "tokens", made_by="tokenize")
    path = model_path(recipe, tokens)
    config = {
        "finetune": settings.model_dump(mode="json", exclude=set(_FREE)),
        "model": path,
        "revision": recipe.model.revision if recipe.model else None,
        "seed": recipe.seed,
        "limit": limit,
    }
    target = recipe.run_dir / "adapter"
    parents = {"tokens": tokens.hash}
    if dry_run:
        return {"stage": "finetune", "dry_run": True, "target": str(target), "config": config, "rows": tokens.rows}
    staging: Staging | None = None
    if is_main():
        staging = open_stage(target, stage="finetune", config=config, parents=parents, force=force, on_change="refuse")
    if staging is None and (is_main() or (not force and _is_made(target, config, parents))):
        console.say(f"finetune: {target} is up to date (same settings, same tokens); nothing to do")
        return {"stage": "finetune", "cached": True, "target": str(target), **read_manifest(target).facts}
    with staging or nullcontext():
        run = _prepare(
            recipe, settings, tokens, path, {"config": config, "tokens": tokens.hash}, limit, offline, console
        )
        outcome = _train(run, resume, console)
        if staging is None:
            return {"stage": "finetune", "rank": run.accelerator.process_index}
        return _publish(run, outcome, console, staging)


def _is_made(target: Path, config: dict[str, Any], parents: dict[str, str]) -> bool:
    """Says what the first process finds too, so that the others do not wait for it."""
    if not is_finished(target):
        return False
    made = read_manifest(target)
    return made.config == json.loads(json.dumps(config, default=str)) and made.parents == parents


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


def _prepare(
    recipe: Recipe,
    settings: Finetune,
    tokens: Manifest,
    path: str,
    identity: dict[str, Any],
    limit: int | None,
    offline: bool,
    console: Talk,
) -> _Run:
    from datetime import timedelta

    from accelerate import Accelerator, InitProcessGroupKwargs

    from mmtune.encoding.processor import load_processor, processor_fingerprint
    from mmtune.training.batching import packed_trees, rows_apart
    from mmtune.training.checkpoints import CheckpointFolder
    from mmtune.training.optimizer import make_adamw
    from mmtune.training.ranks import share_weights

    precision = _precision(settings.precision)
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        log_with=list(settings.trackers) or None,
        project_dir=str(recipe.run_dir / "trackers"),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=settings.rank_timeout_seconds))],
    )
    processor = load_processor(
        path,
        revision=recipe.model.revision if recipe.model else None,
        offline=offline,
        min_image_pixels=recipe.tokenize.min_image_pixels,
        max_image_pixels=recipe.tokenize.max_image_pixels,
    )
    if processor_fingerprint(processor) != tokens.facts.get("processor"):
        raise IntegrityError(
            "the processor is not the one that tokens/ was made with", "run: mmtune tokenize", "other_processor"
        )
    model = _model(recipe, settings, path, precision, offline)
    _show_towers(model, console)
    train = _split(recipe, tokens, processor, "train", limit)
    val = _split(recipe, tokens, processor, "val", settings.eval_rows) if tokens.rows.get("val") else None
    model.to(accelerator.device)
    share_weights(model)
    as_trees = _trains_trees(model, train, accelerator, console)
    make = partial(packed_trees, model) if as_trees else rows_apart
    budget = {"batch_tokens": settings.batch_tokens, "batch_rows": settings.batch_rows}
    batching = make(
        train,
        {
            **budget,
            "seed": recipe.seed,
            "micro_batches": accelerator.num_processes * settings.accumulate,
            "epochs": settings.epochs,
            "max_steps": settings.max_steps,
        },
    )
    held_out = val and make(val, {**budget, "seed": 0, "micro_batches": 1, "epochs": 1.0})
    optimizer = make_adamw(
        model,
        rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        beta2=settings.beta2,
        tower_rates=settings.tower_rates,
        plus_ratio=settings.lora.plus_ratio,
    )
    checkpoints = CheckpointFolder(recipe.run_dir / "checkpoints" / "finetune", settings.keep)
    identity = {
        **identity,
        "micro_batches": batching.plan.micro_batches,
        "precision": precision,
        "batches": "trees" if as_trees else "rows",
    }
    return _Run(
        recipe,
        settings,
        tokens,
        model,
        optimizer,
        accelerator,
        batching,
        train,
        held_out,
        checkpoints,
        identity,
        processor,
    )


def _trains_trees(model: Any, split: Any, accelerator: Any, console: Talk) -> bool:
    """Says whether shared prefixes are computed once: where there are some, and the model proves exact on them."""
    import torch

    from mmtune.training.batching import check_sharing
    from mmtune.training.ranks import sum_tensor

    if not split.shares:
        return False
    check = check_sharing(model, split, accelerator)
    refused = sum_tensor(torch.tensor([float(not check.exact)], device=accelerator.device), "agreeing on trees")
    if not check.exact:
        console.note(f"each row trains apart, its media computed again: {check.reason}")
    elif not refused:
        console.say(
            "finetune: rows that share media train as one tree; a few compared with separate rows:"
            f" loss differs by {check.loss_error:.0e}, gradients by {check.gradient_error:.0e} of 1"
        )
    return not refused


def _precision(asked: str) -> str:
    import torch

    if asked != "auto":
        return asked
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


def _model(recipe: Recipe, settings: Finetune, path: str, precision: str, offline: bool) -> Any:
    import torch

    from mmtune.models.adapter import add_noise_to_embeddings
    from mmtune.models.load import load_model
    from mmtune.models.method import with_method

    torch.manual_seed(recipe.seed)
    # A frozen base may rest in bf16; weights that train themselves stay in fp32.
    dtype = torch.bfloat16 if precision == "bf16" and settings.method != "full" else torch.float32
    model: Any = load_model(
        path,
        revision=recipe.model.revision if recipe.model else None,
        dtype=dtype,
        attn=recipe.model.attn if recipe.model else "auto",
        offline=offline,
        random_weights=settings.from_scratch,
        nf4=settings.quantize == "nf4",
    )
    if settings.neftune_alpha:
        add_noise_to_embeddings(model, settings.neftune_alpha)
    if settings.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    lora = settings.lora.model_dump(exclude={"init", "plus_ratio"})
    lora |= {
        "targets": None if lora["targets"] == "all-linear" else lora["targets"],
        "pissa": settings.lora.init == "pissa",
    }
    return with_method(
        model,
        settings.method,
        towers=settings.train,
        lora=lora,
        virtual_tokens=settings.virtual_tokens,
        base_path=path,
    )


def _split(recipe: Recipe, tokens: Manifest, processor: Any, split: str, limit: int | None) -> Any:
    from mmtune.encoding.collate import Collator
    from mmtune.training.batching import load_split

    table = open_split(recipe.run_dir / "tokens" / split)
    table = table.slice(0, limit) if limit else table
    if table.num_rows == 0:
        raise DataError(f"tokens/{split} has no rows", "look at tokens/rejects.jsonl", "no_rows")
    collate = Collator(processor, media_root=Path(tokens.facts["media_root"]))
    return load_split(table, collate)


def _show_towers(model: Any, console: Talk) -> None:
    from mmtune.models.towers import tower_table

    rows = [(row.tower, row.state, row.parameters, row.trainable) for row in tower_table(model)]
    console.table("what trains", ("tower", "state", "parameters", "trainable"), rows)


def _resume_from(run: _Run, resume: str, console: Talk) -> tuple[int, str]:
    """Puts the newest checkpoint back; returns its step and metrics."""
    from mmtune.models.adapter import load_trainable_state
    from mmtune.storage import changes
    from mmtune.training.optimizer import load_optimizer_state
    from mmtune.training.ranks import wait_for_all

    if resume == "never":
        if run.accelerator.is_main_process:
            run.checkpoints.clear()
        wait_for_all("clearing old checkpoints")
        return 0, ""
    checkpoint = run.checkpoints.newest()
    if checkpoint is None:
        return 0, ""
    different = changes(checkpoint.identity, run.identity)
    if different:
        raise IntegrityError(
            "the checkpoint on disk belongs to another run: " + "; ".join(different),
            "go back to those settings, or start again with --resume never",
            "other_run",
        )
    load_trainable_state(run.model, run.checkpoints.load(checkpoint, "trainable"))
    load_optimizer_state(run.optimizer, run.model, run.checkpoints.load(checkpoint, "optimizer"))
    console.say(f"finetune: resuming after step {checkpoint.step} of {run.train.plan.total_steps}")
    return checkpoint.step, run.checkpoints.metrics(checkpoint)


def _train(run: _Run, resume: str, console: Talk) -> Any:
    from mmtune.training.loop import LoopSettings, train
    from mmtune.training.ranks import wait_for_all

    start, metrics = _resume_from(run, resume, console)
    settings, plan = run.settings, run.train.plan
    console.say(
        f"finetune: {plan.sizes.rows.sum():,} rows in {plan.sizes.rows.size:,} trees,"
        f" {plan.total_steps:,} steps, {run.accelerator.num_processes} process(es) on {run.accelerator.device}"
    )
    if settings.trackers:
        run.accelerator.init_trackers("mmtune", config={"seed": run.recipe.seed})
    loop_settings = LoopSettings(
        seed=run.recipe.seed,
        peak_rate=settings.learning_rate,
        schedule=settings.schedule,
        warmup=settings.warmup,
        clip=settings.clip,
        save_every=settings.save_every,
        log_every=settings.log_every,
        eval_every=settings.eval_every,
        workers=settings.workers,
    )
    with console.progress(plan.total_steps, "finetune") as bar:
        bar.advance(start)
        outcome = train(
            run.model,
            run.optimizer,
            run.accelerator,
            plan,
            loop_settings,
            _hooks(run, console, bar.advance),
            start=start,
            metrics=metrics,
        )
    if settings.trackers:
        run.accelerator.end_training()
    if outcome.unseen:
        console.note(f"no row has media for the {' and '.join(sorted(outcome.unseen))} tower; it did not train")
    wait_for_all("ending the run")
    if outcome.stopped_by:
        error = Interrupted(
            f"stopped by a signal after step {outcome.step} of {plan.total_steps}; the state is saved",
            "run the same command again to go on",
        )
        error.exit_code = 130 if outcome.stopped_by == 2 else 75
        raise error
    return outcome


def _hooks(run: _Run, console: Talk, advance: Callable[[int, str], None]) -> Any:
    from mmtune.models.adapter import trainable_state
    from mmtune.training.loop import Hooks
    from mmtune.training.optimizer import optimizer_state
    from mmtune.training.ranks import wait_for_all

    def save(step: int, metrics: str) -> None:
        if run.accelerator.is_main_process:
            tensors = {"trainable": trainable_state(run.model), "optimizer": optimizer_state(run.optimizer, run.model)}
            run.checkpoints.save(step, tensors, metrics, run.identity)
        wait_for_all("saving a checkpoint")

    def log(row: dict[str, Any]) -> None:
        if run.settings.trackers:
            run.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    return Hooks(
        batch=run.train.batch,
        loss=run.train.loss,
        ids=run.split.source.ids,
        modalities=run.split.source.modalities,
        save=save,
        last_good=run.checkpoints.newest_name,
        validate=lambda: _validation_loss(run),
        log=log,
        note=console.note,
        advance=advance,
    )


def _validation_loss(run: _Run) -> float | None:
    """Returns the mean loss per label token on the validation split, or None without one."""
    if run.validate is None:
        return None
    from mmtune.training.validation import validation_loss

    return validation_loss(run.model, run.accelerator, run.validate.plan, run.validate.batch, run.validate.loss)


def _publish(run: _Run, outcome: Any, console: Talk, staging: Staging) -> dict[str, Any]:
    from mmtune.encoding.processor import tokenizer_of
    from mmtune.evaluation.generation import stop_ids
    from mmtune.models.adapter import save_tuned
    from mmtune.models.towers import tower_table
    from mmtune.training.meter import shares

    towers = {row.tower: {"state": row.state, "trainable": row.trainable} for row in tower_table(run.model)}
    save_tuned(run.model, staging.path)
    run.processor.save_pretrained(str(staging.path))
    (staging.path / "metrics.jsonl").write_text(outcome.metrics, "utf-8")
    rows = [json.loads(line) for line in outcome.metrics.splitlines()]
    facts = {
        "model": run.tokens.facts.get("model"),
        "method": run.settings.method,
        "towers": towers,
        "steps": outcome.step,
        "loss": next((row["loss"] for row in reversed(rows) if "loss" in row), None),
        "val_loss": next((row["val_loss"] for row in reversed(rows) if "val_loss" in row), None),
        **shares(outcome.seconds),
        "media_root": run.tokens.facts.get("media_root"),
        "eos_token_ids": stop_ids(run.model, tokenizer_of(run.processor)),
    }
    timings = {f"{name}_seconds": round(value, 3) for name, value in outcome.seconds.items()}
    staging.publish(rows={"train": int(run.train.plan.sizes.rows.sum())}, facts=facts, timings=timings)
    run.checkpoints.clear()
    shutil.rmtree(run.checkpoints.folder.parent, ignore_errors=True)
    losses = [f"{name} {facts[key]:.4f}" for name, key in (("loss", "loss"), ("val loss", "val_loss")) if facts[key]]
    console.say(f"finetune: wrote {staging.target} ({', '.join(losses) or 'no loss logged'})")
    return {"stage": "finetune", "cached": False, "target": str(staging.target), **facts}


def launch(arguments: list[str], processes: int, *, cpu: bool, console: Talk) -> int:
    """Starts the same command on several processes and returns their exit code."""
    return launching.launch(arguments, processes, cpu=cpu, say=console.say)
