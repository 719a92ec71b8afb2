"""Everything that one process needs before the first step: model, batches, optimizer, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmtune import __version__
from mmtune.errors import CapabilityError, DataError, IntegrityError, RecipeError
from mmtune.recipe import Augment, Finetune, Recipe
from mmtune.stages.finetune.base import load_base, model_to_train, place, show_towers, weights_dtype
from mmtune.stages.finetune.features import Means, use_features
from mmtune.stages.finetune.pixels import use_pixels
from mmtune.stages.finetune.wanted import wanted_features, with_proved
from mmtune.storage import Manifest, library_versions, open_split
from mmtune.talk import Talk

SPREAD = ("shard", "offload", "engine", "liger")
"""Settings of where and by which kernels a run computes: free to change while it is stopped."""
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
    surroundings: dict[str, Any]
    processor: Any
    load: Callable[..., Any]
    ledger: Any
    unfreezing: Any


def prepare(
    recipe: Recipe,
    settings: Finetune,
    tokens: Manifest,
    path: str,
    identity: dict[str, Any],
    limit: int | None,
    resume: str,
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
        resume: ``auto`` or ``never``.
        offline: Never reach for the network.
        console: Where the table of towers and notes go.

    Raises:
        DataError: A split is empty.
        IntegrityError: The processor is not the one of tokens/.
    """
    from mmtune.encoding.processor import tokenizer_of
    from mmtune.models.attention import is_flex
    from mmtune.models.left_out import set_aside
    from mmtune.training.batching import packed_trees, rows_apart
    from mmtune.training.checkpoints import CheckpointFolder
    from mmtune.training.data import row_sizes, soft_token_count
    from mmtune.training.engine import precision_of
    from mmtune.training.ledger import Ledger
    from mmtune.training.step_size import LIMITS, StepSize, planned_size
    from mmtune.training.surroundings import surroundings
    from mmtune.training.tasks import weigh_tasks

    _trackers_are_here(settings.trackers)
    precision = precision_of(settings.precision)
    accelerator = _accelerator(recipe, settings, precision)
    processor = _processor(recipe, tokens, path, offline)
    splits = {"train": _split(recipe, tokens, processor, "train", limit, settings.augment)}
    if tokens.rows.get("val"):
        splits["val"] = _split(recipe, tokens, processor, "val", settings.eval_rows)
    load = partial(load_base, recipe, settings, path, precision, offline)
    wanted = wanted_features(
        settings,
        recipe.run_dir / "features" / "towers",
        _made_from(identity, tokens, recipe, settings, precision),
        splits,
        precision,
        accelerator,
    )
    absent = [one.kind for one in wanted if one.found]
    soft = max(soft_token_count(split.table) for split in splits.values())
    row_tokens = float(row_sizes(splits["train"].table)[0].tokens.mean())
    model = model_to_train(recipe, settings, path, absent, load, tokenizer_of(processor), soft, row_tokens, console)
    show_towers(model, console)
    with set_aside(model):
        place(model, settings, accelerator, console)
    checkpoints = CheckpointFolder(recipe.run_dir / "checkpoints" / "finetune", settings.keep)
    own_size = StepSize(
        accelerator.num_processes * settings.accumulate, **{name: getattr(settings, name) for name in LIMITS}
    )
    size = planned_size(own_size, checkpoints.newest_identity() if resume == "auto" else None)
    rows = _batching_of(rows_apart, recipe, settings, size, own_size)
    train = with_proved(splits, wanted)["train"]
    attn = recipe.model.attn if recipe.model else "auto"
    as_trees = _trains_trees(model, train, rows(train, "train").plan, attn, accelerator, console)
    make = _batching_of(partial(packed_trees, model), recipe, settings, size, own_size) if as_trees else rows
    means = Means(settings, precision, model, make, as_trees, partial(load, whole=True), accelerator, console)
    kept, kinds = use_features(wanted, splits, means)
    if "image" not in kinds:
        shelves = recipe.run_dir / "features" / "pixels"
        kept = use_pixels(settings, shelves, str(tokens.facts["processor"]), kept, accelerator, console)
    tasks, ledger = _tasks(recipe, settings, list(kept)), Ledger()
    batching = weigh_tasks(make(kept["train"], "train"), tasks, ledger)
    held_out = weigh_tasks(make(kept["val"], "val"), tasks, ledger) if "val" in kept else None
    batching, unfreezing = _staged(batching, model, settings, console)
    optimizer = _optimizer(model, settings, accelerator)
    # Bins are of another length under FlexAttention.
    batches = ("trees for FlexAttention" if is_flex(model) else "trees") if as_trees else "rows"
    decided = {"step_size": asdict(size), "precision": precision, "batches": batches, "features": kinds}
    whole = _identity(identity, decided)
    parts = (recipe, settings, tokens, model, optimizer, accelerator, batching, held_out, checkpoints, whole)
    spread = {name: getattr(settings, name) for name in SPREAD}
    under = surroundings(model, accelerator, {"mmtune": __version__, **library_versions()}, **spread)
    return Run(*parts, under, processor, means.load, ledger, unfreezing)


def _staged(batching: Any, model: Any, settings: Finetune, console: Talk) -> tuple[Any, Any]:
    """Returns the batching whose loss unfreezes towers, where the recipe has some start frozen, and what thaws them."""
    from mmtune.training.unfreezing import Unfreezing, frozen_steps, in_stages, said_of_stages

    steps = frozen_steps({str(tower): epochs for tower, epochs in settings.unfreeze.items()}, batching.plan)
    unfreezing = Unfreezing(model, steps)
    for sentence in said_of_stages(steps, batching.plan.total_steps):
        console.say(f"finetune: {sentence}")
    return (in_stages(batching, unfreezing) if steps else batching), unfreezing


def _tasks(recipe: Recipe, settings: Finetune, splits: Sequence[str]) -> Any:
    """Returns the tasks by which the loss is weighed; none where the recipe weighs none."""
    from mmtune.training.tasks import Tasks, tasks_of

    if not settings.task_weights:
        return Tasks({}, {})
    tables = [open_split(recipe.run_dir / "instructions" / split) for split in splits]
    return tasks_of(tables, settings.task_weights, "finetune")


def _processor(recipe: Recipe, tokens: Manifest, path: str, offline: bool) -> Any:
    """Returns the model's processor, if it is the one that tokens/ was made with."""
    from mmtune.encoding.processor import load_processor, processor_fingerprint

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
    return processor


def _identity(identity: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Returns what a checkpoint must share with the run, with what was found out while preparing it."""
    from mmtune.training.step_size import LIMITS

    # Micro batches may change as long as as much makes a step; see ``planned_size``.
    config = identity["config"]
    own = {name: value for name, value in config["finetune"].items() if name not in ("accumulate", *LIMITS)}
    return {**identity, "config": {**config, "finetune": own}, **found}


def _accelerator(recipe: Recipe, settings: Finetune, precision: str) -> Any:
    """Returns the accelerator, the processes met."""
    from datetime import timedelta

    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    from mmtune.training.launch import is_launched
    from mmtune.training.sharding import meet_for_offload
    from mmtune.training.zero import deepspeed_is_here

    timeout = timedelta(seconds=settings.rank_timeout_seconds)
    if settings.engine == "deepspeed":
        deepspeed_is_here("cuda" if torch.cuda.is_available() else "cpu")
    if settings.offload and settings.engine == "fsdp2":
        if is_launched() and settings.shard == "none":
            raise RecipeError("finetune.offload on several processes goes with shard", "set finetune.shard: zero3")
        meet_for_offload(timeout, alone=not is_launched())
    return Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        log_with=list(settings.trackers) or None,
        project_dir=str(recipe.run_dir / "trackers"),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
    )


def _optimizer(model: Any, settings: Finetune, accelerator: Any) -> Any:
    """Returns what takes the steps."""
    from mmtune.training.optimizer import make_optimizer

    make = partial(
        make_optimizer,
        name=settings.optimizer,
        rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        beta2=settings.beta2,
        tower_rates=settings.tower_rates,
        plus_ratio=settings.lora.plus_ratio,
        prompt_rate=settings.soft_prompt.learning_rate if settings.soft_prompt else None,
    )
    return _by_deepspeed(model, make, settings, accelerator) if _goes_deep(settings) else make(model)


def _goes_deep(settings: Finetune) -> bool:
    """Says whether DeepSpeed takes the steps."""
    from mmtune.training.ranks import world_size

    return settings.engine == "deepspeed" and world_size() > 1


def _by_deepspeed(model: Any, make: Any, settings: Finetune, accelerator: Any) -> Any:
    from mmtune.training.zero import Zero

    stage = 2 if settings.shard == "zero2" else 3
    return Zero(model, make, stage=stage, device=accelerator.device, offload=settings.offload)


def _batching_of(make: Any, recipe: Recipe, settings: Finetune, size: Any, own_size: Any) -> Any:
    """Returns a function from a split and its name to its batching.

    Args:
        make: Makes the batching of a split for a course.
        recipe: The recipe.
        settings: Its finetune part.
        size: The size of a step by which the run is planned.
        own_size: That of this process's settings.
    """
    train = {
        **asdict(size),
        "cut": None if size == own_size else own_size.limits(),
        "seed": recipe.seed,
        "epochs": settings.epochs,
        "max_steps": settings.max_steps,
    }
    held_out = {**own_size.limits(), "cut": None, "seed": 0, "micro_batches": 1, "epochs": 1.0}
    return lambda split, name: make(split, train if name == "train" else held_out)


def _made_from(
    identity: dict[str, Any], tokens: Manifest, recipe: Recipe, settings: Finetune, precision: str
) -> dict[str, Any]:
    """Returns what the features of media depend on."""
    config = identity["config"]
    made = {"weights": config["weights"], "model": config["model"], "processor": tokens.facts.get("processor")}
    made |= {"attn": recipe.model.attn if recipe.model else "auto", "tower": str(weights_dtype(settings, precision))}
    return made | ({"random": recipe.seed} if settings.from_scratch else {})


def _trains_trees(model: Any, split: Any, rows: Any, attn: str, accelerator: Any, console: Talk) -> bool:
    """Says whether rows are packed: where they share a prefix or packing saves padding, and the model proves exact.

    Args:
        model: The model.
        split: The training split.
        rows: The plan of its rows, each apart.
        attn: The attention kernel that the recipe asks for; the model is left with the one that proved exact.
        accelerator: The accelerator.
        console: Where the verdict goes.
    """
    import torch

    from mmtune.models.attention import text_attention
    from mmtune.training.batching import check_sharing
    from mmtune.training.ranks import sum_tensor
    from mmtune.training.tree_kernels import kernels_to_try, prove

    def agree(exact: bool) -> bool:
        refused = torch.tensor([float(not exact)], device=accelerator.device)
        return float(sum_tensor(refused, "agreeing on trees")) == 0

    kernels = kernels_to_try(model, attn, accelerator.device.type)
    padding = 0.0 if split.shares else rows.padding()
    if not split.shares and padding < _LEAST_PADDING:
        return False
    own = text_attention(model)
    proof = prove(model, kernels, lambda: check_sharing(model, split, accelerator, own, rows.batch_tokens), agree)
    for line in proof.refused:
        console.note(f"trees do not train by {line}")
    if not proof.exact:
        cost = "its media computed again" if split.shares else f"with {padding:.0%} padding"
        console.note(f"each row trains apart, {cost}: {proof.check.reason or 'another process refused trees'}")
        return False
    what = "rows that share media train as one tree" if split.shares else f"packed, for {padding:.0%} less padding"
    console.say(
        f"finetune: {what}, by {proof.kernel}; a few compared with separate rows:"
        f" loss differs by {proof.check.loss_error:.0e}, gradients by {proof.check.gradient_error:.0e} of 1"
    )
    return True


def _trackers_are_here(names: Sequence[str]) -> None:
    """Refuses a tracker that is not installed, which Accelerate would pass over in silence."""
    from accelerate.tracking import get_available_trackers

    absent = sorted(set(names) - {str(tracker) for tracker in get_available_trackers()})
    if absent:
        raise CapabilityError(
            f"the tracker {' and '.join(absent)} is not installed", "pip install 'mmtune[trackers]', or leave it out"
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
