"""Everything that one process needs before the first step: model, batches, optimizer, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmtune import __version__
from mmtune.errors import CapabilityError, DataError, RecipeError
from mmtune.recipe import Augment, Finetune, Recipe
from mmtune.stages.finetune.base import load_base, model_to_train, place, show_towers, weights_dtype
from mmtune.stages.finetune.batches import Ground, batched, said_of_steps, step_size
from mmtune.stages.finetune.wanted import wanted_features
from mmtune.storage import Manifest, changes, library_versions, open_split
from mmtune.talk import Talk

SPREAD = ("shard", "offload", "engine", "liger")
"""Settings of where and by which kernels a run computes: free to change while it is stopped."""


@dataclass
class Run:
    """Everything one process needs for training; ``also`` is advice on a checkpoint, see ``said_of_steps``."""

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
    also: str


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
        IntegrityError: The processor is not the one of tokens/, or the checkpoint belongs to another run.
    """
    from mmtune.models.attention import is_flex
    from mmtune.models.composite.scores import has_auxiliary_loss
    from mmtune.training.checkpoints import CheckpointFolder
    from mmtune.training.ledger import Ledger
    from mmtune.training.step_size import planned_size
    from mmtune.training.surroundings import surroundings
    from mmtune.training.tasks import by_parts

    ground = _ground(recipe, settings, tokens, path, identity, limit, offline)
    checkpoints = CheckpointFolder(recipe.run_dir / "checkpoints" / "finetune", settings.keep)
    newest = checkpoints.newest_identity() if resume == "auto" else None
    processes = ground.accelerator.num_processes
    own_size = step_size(settings, processes)
    size, also = planned_size(own_size, newest), said_of_steps(own_size, processes, newest)
    decided: dict[str, Any] = {"step_size": asdict(size), "precision": ground.precision}
    _check_known(_identity(identity, decided), newest, also)
    model = _model(recipe, settings, path, ground, console)
    rows = batched(recipe, settings, tokens, model, ground, (own_size, size), console)
    tasks, ledger = _tasks(recipe, settings, ["train", *([] if rows.validate is None else ["val"])]), Ledger()
    named = partial(by_parts, tasks=tasks, ledger=ledger, apart=has_auxiliary_loss(model))
    train, unfreezing = _staged(named(rows.train), model, settings, console)
    optimizer = _optimizer(model, settings, ground.accelerator)
    # Bins are of another length under FlexAttention.
    trees = "trees for FlexAttention" if is_flex(model) else "trees"
    decided |= {"batches": trees if rows.as_trees else "rows", "features": rows.features}
    spread = {name: getattr(settings, name) for name in SPREAD}
    return Run(
        recipe=recipe,
        settings=settings,
        tokens=tokens,
        model=model,
        optimizer=optimizer,
        accelerator=ground.accelerator,
        train=train,
        validate=None if rows.validate is None else named(rows.validate),
        checkpoints=checkpoints,
        identity=_identity(identity, decided),
        surroundings=surroundings(model, ground.accelerator, {"mmtune": __version__, **library_versions()}, **spread),
        processor=ground.processor,
        load=rows.load,
        ledger=ledger,
        unfreezing=unfreezing,
        also=also,
    )


def _check_known(known: dict[str, Any], newest: Any, also: str) -> None:
    """Refuses, before a model is loaded, to go on from a checkpoint that is seen to belong to another run.

    Args:
        known: What a checkpoint must share with this run, as far as it is known without the model.
        newest: The identity of the checkpoint, or None.
        also: See ``said_of_steps``.

    Raises:
        IntegrityError: It belongs to another run.
    """
    from mmtune.training.course import check_same_run

    if newest is None:
        return
    check_same_run(changes({name: newest.get(name) for name in known}, known), "finetune", also)


def _ground(
    recipe: Recipe,
    settings: Finetune,
    tokens: Manifest,
    path: str,
    identity: dict[str, Any],
    limit: int | None,
    offline: bool,
) -> Ground:
    from mmtune.training.engine import precision_of

    _trackers_are_here(settings.trackers)
    precision = precision_of(settings.precision)
    accelerator = _accelerator(recipe, settings, precision)
    processor = _processor(recipe, tokens, path, offline)
    splits = {"train": _split(recipe, tokens, processor, "train", limit, settings.augment)}
    if tokens.rows.get("val"):
        splits["val"] = _split(recipe, tokens, processor, "val", settings.eval_rows)
    made_from = _made_from(identity, tokens, recipe, settings, precision)
    towers = recipe.run_dir / "features" / "towers"
    wanted = wanted_features(settings, towers, made_from, splits, precision, accelerator)
    load = partial(load_base, recipe, settings, path, precision, offline)
    return Ground(precision, accelerator, processor, splits, wanted, load)


def _model(recipe: Recipe, settings: Finetune, path: str, ground: Ground, console: Talk) -> Any:
    """Returns the model that trains, on its device."""
    from mmtune.encoding.processor import tokenizer_of
    from mmtune.models.left_out import set_aside
    from mmtune.training.data import row_sizes, soft_token_count

    absent = [one.kind for one in ground.wanted if one.found]
    soft = max(soft_token_count(split.table) for split in ground.splits.values())
    row_tokens = float(row_sizes(ground.splits["train"].table)[0].tokens.mean())
    tokenizer = tokenizer_of(ground.processor)
    model = model_to_train(recipe, settings, path, absent, ground.load, tokenizer, soft, row_tokens, console)
    show_towers(model, console)
    with set_aside(model):
        place(model, settings, ground.accelerator, console)
    return model


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
    from mmtune.encoding.processor import same_processor

    revision = recipe.model.revision if recipe.model else None
    budget = recipe.tokenize.model_dump(include={"min_image_pixels", "max_image_pixels"})
    return same_processor(path, tokens.facts.get("processor"), revision=revision, offline=offline, **budget)


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


def _made_from(
    identity: dict[str, Any], tokens: Manifest, recipe: Recipe, settings: Finetune, precision: str
) -> dict[str, Any]:
    """Returns what the features of media depend on."""
    config = identity["config"]
    made = {"weights": config["weights"], "model": config["model"], "processor": tokens.facts.get("processor")}
    made |= {"attn": recipe.model.attn if recipe.model else "auto", "tower": str(weights_dtype(settings, precision))}
    return made | ({"random": recipe.seed} if settings.from_scratch else {})


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
