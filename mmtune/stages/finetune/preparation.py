"""Everything that one process needs before the first step: model, batches, optimizer, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmtune.errors import CapabilityError, DataError, IntegrityError
from mmtune.recipe import Augment, Finetune, Recipe
from mmtune.stages.finetune.features import Means, use_features
from mmtune.stages.finetune.wanted import wanted_features, with_proved
from mmtune.storage import Manifest, open_split
from mmtune.talk import Talk

# Rows that share nothing are packed when padding would take more than this share of the tokens.
_LEAST_PADDING = 0.1


@dataclass
class Run:
    """Everything one process needs for training."""

    recipe: Recipe
    settings: Finetune
    tokens: Manifest
    model: Any
    optimizer: Any
    accelerator: Any
    train: Any
    validate: Any
    checkpoints: Any
    identity: dict[str, Any]
    processor: Any
    load: Callable[..., Any]


def prepare(
    recipe: Recipe,
    settings: Finetune,
    tokens: Manifest,
    path: str,
    identity: dict[str, Any],
    limit: int | None,
    offline: bool,
    console: Talk,
) -> Run:
    """Loads the model, its splits and its optimizer, and decides how rows become batches.

    Args:
        recipe: The recipe.
        settings: Its finetune part, with defaults.
        tokens: The manifest of tokens/.
        path: Folder or hub id of the model.
        identity: What a checkpoint must share with this run, as far as the stage knows it.
        limit: At most this many training rows.
        offline: Never reach for the network.
        console: Where the table of towers and notes go.

    Raises:
        DataError: A split is empty.
        IntegrityError: The processor is not the one of tokens/.
    """
    from datetime import timedelta

    from accelerate import Accelerator, InitProcessGroupKwargs

    from mmtune.encoding.processor import load_processor, processor_fingerprint
    from mmtune.models.left_out import set_aside
    from mmtune.training.batching import packed_trees, rows_apart
    from mmtune.training.checkpoints import CheckpointFolder
    from mmtune.training.launch import is_launched
    from mmtune.training.optimizer import make_optimizer
    from mmtune.training.sharding import meet_for_offload

    _trackers_are_here(settings.trackers)
    precision = _precision(settings.precision)
    timeout = timedelta(seconds=settings.rank_timeout_seconds)
    if settings.offload and is_launched():
        meet_for_offload(timeout)
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        log_with=list(settings.trackers) or None,
        project_dir=str(recipe.run_dir / "trackers"),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
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
    splits = {"train": _split(recipe, tokens, processor, "train", limit, settings.augment)}
    if tokens.rows.get("val"):
        splits["val"] = _split(recipe, tokens, processor, "val", settings.eval_rows)
    load = partial(_load, recipe, settings, path, precision, offline)
    wanted = wanted_features(
        settings,
        recipe.run_dir / "features" / "towers",
        _made_from(identity, tokens, recipe, settings, precision),
        splits,
        precision,
        accelerator,
    )
    model = _model(recipe, settings, path, [one.kind for one in wanted if one.found], load, console)
    _show_towers(model, console)
    with set_aside(model):
        _place(model, settings, accelerator, console)
    rows = _batching_of(rows_apart, recipe, settings, accelerator)
    train = with_proved(splits, wanted)["train"]
    as_trees = _trains_trees(model, train, rows(train, "train").plan, accelerator, console)
    make = _batching_of(partial(packed_trees, model), recipe, settings, accelerator) if as_trees else rows
    means = Means(settings, precision, model, make, as_trees, partial(load, whole=True), accelerator, console)
    kept, kinds = use_features(wanted, splits, means)
    batching = make(kept["train"], "train")
    held_out = make(kept["val"], "val") if "val" in kept else None
    optimizer = make_optimizer(
        model,
        name=settings.optimizer,
        rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        beta2=settings.beta2,
        tower_rates=settings.tower_rates,
        plus_ratio=settings.lora.plus_ratio,
    )
    checkpoints = CheckpointFolder(recipe.run_dir / "checkpoints" / "finetune", settings.keep)
    # What counts of the accumulation is its product with the processes.
    config = identity["config"]
    own = {name: value for name, value in config["finetune"].items() if name != "accumulate"}
    identity = {
        **identity,
        "config": {**config, "finetune": own},
        "micro_batches": batching.plan.micro_batches,
        "precision": precision,
        "batches": "trees" if as_trees else "rows",
        "features": kinds,
    }
    return Run(
        recipe,
        settings,
        tokens,
        model,
        optimizer,
        accelerator,
        batching,
        held_out,
        checkpoints,
        identity,
        processor,
        means.load,
    )


def _place(model: Any, settings: Finetune, accelerator: Any, console: Talk) -> None:
    """Moves the model to this process's device, whole or its part, the same weights everywhere."""
    from mmtune.training.ranks import share_weights, world_size

    if settings.shard != "none" and world_size() > 1:
        from mmtune.training.sharding import shard_language_model

        if "llm" not in settings.train:
            # Every process then goes through the same layers backward, also one without a picture.
            model.enable_input_require_grads()
        shard_language_model(
            model, accelerator.device, keep_gathered=settings.shard == "zero2", offload=settings.offload
        )
        return
    if settings.shard != "none":
        console.note("finetune.shard does nothing with one process")
    model.to(accelerator.device)
    share_weights(model)


def _batching_of(make: Any, recipe: Recipe, settings: Finetune, accelerator: Any) -> Any:
    """Returns a function from a split and its name to its batching."""
    budget = {"batch_tokens": settings.batch_tokens, "batch_rows": settings.batch_rows}
    train = {
        **budget,
        "seed": recipe.seed,
        "micro_batches": accelerator.num_processes * settings.accumulate,
        "epochs": settings.epochs,
        "max_steps": settings.max_steps,
    }
    held_out = {**budget, "seed": 0, "micro_batches": 1, "epochs": 1.0}
    return lambda split, name: make(split, train if name == "train" else held_out)


def _made_from(
    identity: dict[str, Any], tokens: Manifest, recipe: Recipe, settings: Finetune, precision: str
) -> dict[str, Any]:
    """Returns what the features of media depend on."""
    config = identity["config"]
    made = {"weights": config["weights"], "model": config["model"], "processor": tokens.facts.get("processor")}
    made |= {"attn": recipe.model.attn if recipe.model else "auto", "tower": str(_weights_dtype(settings, precision))}
    return made | ({"random": recipe.seed} if settings.from_scratch else {})


def _trains_trees(model: Any, split: Any, rows: Any, accelerator: Any, console: Talk) -> bool:
    """Says whether rows are packed: where they share a prefix or packing saves padding, and the model proves exact.

    Args:
        model: The model.
        split: The training split.
        rows: The plan of its rows, each apart.
        accelerator: The accelerator.
        console: Where the verdict goes.
    """
    import torch

    from mmtune.training.batching import check_sharing
    from mmtune.training.ranks import sum_tensor

    padding = 0.0 if split.shares else rows.padding()
    if not split.shares and padding < _LEAST_PADDING:
        return False
    check = check_sharing(model, split, accelerator)
    refused = sum_tensor(torch.tensor([float(not check.exact)], device=accelerator.device), "agreeing on trees")
    if not check.exact:
        cost = "its media computed again" if split.shares else f"with {padding:.0%} padding"
        console.note(f"each row trains apart, {cost}: {check.reason}")
    elif not refused:
        what = "rows that share media train as one tree" if split.shares else f"packed, for {padding:.0%} less padding"
        console.say(
            f"finetune: {what}; a few compared with separate rows:"
            f" loss differs by {check.loss_error:.0e}, gradients by {check.gradient_error:.0e} of 1"
        )
    return not refused


def _trackers_are_here(names: Sequence[str]) -> None:
    """Refuses a tracker that is not installed, which Accelerate would pass over in silence."""
    from accelerate.tracking import get_available_trackers

    absent = sorted(set(names) - {str(tracker) for tracker in get_available_trackers()})
    if absent:
        raise CapabilityError(
            f"the tracker {' and '.join(absent)} is not installed", "pip install 'mmtune[trackers]', or leave it out"
        )


def _precision(asked: str) -> str:
    import torch

    if asked != "auto":
        return asked
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


def _weights_dtype(settings: Finetune, precision: str) -> Any:
    """Returns the type of the base's weights: a frozen one may rest in bf16, one that trains itself stays in fp32."""
    import torch

    return torch.bfloat16 if precision == "bf16" and settings.method != "full" else torch.float32


def _load(
    recipe: Recipe,
    settings: Finetune,
    path: str,
    precision: str,
    offline: bool,
    leave_out: Any = None,
    *,
    whole: bool = False,
) -> Any:
    """Returns the base model, less the weights that ``leave_out`` names; ``whole`` quantizes nothing."""
    from mmtune.models.load import load_model

    return load_model(
        path,
        revision=recipe.model.revision if recipe.model else None,
        dtype=_weights_dtype(settings, precision),
        attn=recipe.model.attn if recipe.model else "auto",
        offline=offline,
        random_weights=settings.from_scratch,
        nf4=settings.quantize == "nf4" and not whole,
        leave_out=leave_out,
    )


def _model(
    recipe: Recipe,
    settings: Finetune,
    path: str,
    absent: Sequence[str],
    load: Callable[..., Any],
    console: Talk,
) -> Any:
    """Returns the model with what trains, without the towers of the media in ``absent``."""
    import torch

    from mmtune.models.adapter import add_noise_to_embeddings
    from mmtune.models.left_out import set_aside, tower_weights
    from mmtune.models.liger import use_liger
    from mmtune.models.method import with_method

    torch.manual_seed(recipe.seed)
    behind = "projector" not in settings.train
    model: Any = load(partial(tower_weights, kinds=absent, with_projector=behind) if absent else None)
    if settings.liger == "auto" and use_liger(model):
        console.say("finetune: Liger's kernels are in use")
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
    with set_aside(model):
        return with_method(
            model,
            settings.method,
            towers=settings.train,
            lora=lora,
            virtual_tokens=settings.virtual_tokens,
            base_path=path,
        )


def _split(
    recipe: Recipe, tokens: Manifest, processor: Any, split: str, limit: int | None, augment: Augment | None = None
) -> Any:
    from mmtune.encoding.collate import Collator
    from mmtune.media.augment import Augmentation
    from mmtune.training.batching import Split
    from mmtune.training.data import some_rows

    table = open_split(recipe.run_dir / "tokens" / split)
    table = some_rows(table, limit) if limit else table
    if table.num_rows == 0:
        raise DataError(f"tokens/{split} has no rows", "look at tokens/rejects.jsonl", "no_rows")
    changed = Augmentation(recipe.seed, augment.shift, augment.flips) if augment else None
    collate = Collator(processor, media_root=Path(tokens.facts["media_root"]), augment=changed)
    return Split(table, collate)


def _show_towers(model: Any, console: Talk) -> None:
    from mmtune.models.towers import tower_table

    rows = [(row.tower, row.state, row.parameters, row.trainable) for row in tower_table(model)]
    console.table("what trains", ("tower", "state", "parameters", "trainable"), rows)
