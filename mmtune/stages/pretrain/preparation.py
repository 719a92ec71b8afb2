"""Everything that pretrain needs before the first step: the learner, its batches, optimizer and checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmtune import __version__
from mmtune.errors import DataError, RecipeError
from mmtune.recipe import Recipe
from mmtune.recipe.pretrain import TOWER_OF, Pretrain
from mmtune.storage import Manifest, library_versions, open_split
from mmtune.talk import Talk

# Media that a part's code is made of, by the number that ``tree_modalities`` gives them.
_KINDS = {"image": 1 | 2, "audio": 4, "behaviour": 8}
# Rows that tell what is usual, for codes: a mean that is off by a little lies elsewhere for each part, and tells it.
_MEASURED, _AT_ONCE = 2048, 256


@dataclass
class Run:
    """Everything that training needs."""

    recipe: Recipe
    settings: Pretrain
    tokens: Manifest
    learner: Any
    optimizer: Any
    accelerator: Any
    train: Any
    validate: Any
    checkpoints: Any
    identity: dict[str, Any]
    surroundings: dict[str, Any]
    processor: Any


def prepare(
    recipe: Recipe,
    tokens: Manifest,
    identity: dict[str, Any],
    limit: int | None,
    offline: bool,
    console: Talk,
) -> Run:
    """Loads start/, its splits and its optimizer.

    Args:
        recipe: The recipe.
        tokens: The manifest of tokens/.
        identity: What a checkpoint must share with this run, as far as the stage knows it.
        limit: At most this many training rows.
        offline: Never reach for the network.
        console: Where the table of towers and notes go.

    Raises:
        DataError: A split is empty, or an objective has no row to learn from.
        IntegrityError: The processor is not the one of tokens/.
        RecipeError: Nothing of the model would train.
    """
    from accelerate import Accelerator

    from mmtune.encoding.processor import same_processor
    from mmtune.training.checkpoints import CheckpointFolder
    from mmtune.training.engine import precision_of
    from mmtune.training.learner import Learner
    from mmtune.training.paired import together_of
    from mmtune.training.ranks import share_weights
    from mmtune.training.step_size import StepSize
    from mmtune.training.surroundings import surroundings
    from mmtune.training.tasks import tasks_of

    settings, start = recipe.pretrain, str(recipe.run_dir / "start")
    assert settings is not None
    precision = precision_of(settings.precision)
    accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no")
    budget = recipe.tokenize.model_dump(include={"min_image_pixels", "max_image_pixels"})
    processor = same_processor(start, tokens.facts.get("processor"), offline=offline, **budget)
    model = _model(recipe, start, offline, console)
    size = StepSize(accelerator.num_processes * settings.accumulate, settings.batch_tokens, settings.batch_rows)
    tables = [
        open_split(recipe.run_dir / "instructions" / split) for split in ("train", "val") if tokens.rows.get(split)
    ]
    tasks = tasks_of(tables, settings.task_weights, "pretrain")
    together = together_of(tables, settings.codes.sources)
    train = _batching(recipe, tokens, processor, "train", size, limit, (tasks, together))
    val = None
    if tokens.rows.get("val"):
        val = _batching(recipe, tokens, processor, "val", size, settings.eval_rows, (tasks, together))
    asked = _learner_settings(recipe, settings, processor, train.plan, console)
    learner = Learner(model, replace(asked, tasks=tasks.weights))
    _check_rows(recipe, learner.settings, together, console)
    learner.to(accelerator.device)
    measure(learner, train.batches, train.plan, accelerator)
    share_weights(learner)
    optimizer = _optimizer(learner, settings)
    identity = _identity(identity, {"precision": precision, "step_size": asdict(size)})
    checkpoints = CheckpointFolder(recipe.run_dir / "checkpoints" / "pretrain", settings.keep, "pretrain")
    train = replace(train, loss=lambda learner, batch: learner.loss(batch))
    held_out = None if val is None else replace(val, loss=lambda learner, batch: learner.held_out_loss(batch))
    return Run(
        recipe,
        settings,
        tokens,
        learner,
        optimizer,
        accelerator,
        train,
        held_out,
        checkpoints,
        identity,
        surroundings(model, accelerator, {"mmtune": __version__, **library_versions()}),
        processor,
    )


def _model(recipe: Recipe, start: str, offline: bool, console: Talk) -> Any:
    """Returns the model in start/, with what trains of it."""
    from mmtune.models.load import load_model
    from mmtune.models.towers import check_towers, shown_towers, tower_table
    from mmtune.training.learner import part_of

    settings = recipe.pretrain
    assert settings is not None
    model: Any = load_model(start, attn=recipe.model.attn if recipe.model else "auto", offline=offline)
    present = [row.tower for row in tower_table(model) if row.parameters]
    chosen = present if settings.train == "all" else settings.train
    check_towers(model, chosen, "pretrain")
    # What joins the parts is fresh, and no use as it is.
    trains = {*chosen, *(("fusion",) if "projector" in chosen else ())}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trains)
    console.table(*shown_towers(tower_table(model)))
    return model


def measure(learner: Any, batches: Any, plan: Any, accelerator: Any) -> None:
    """Lets the codes of a learner go by what some rows are like."""
    import numpy as np

    if "codes" not in learner.heads:
        return
    count = plan.sizes.rows.size
    rows = np.unique(np.linspace(0, count - 1, min(count, _MEASURED)).round().astype(int))
    at_once = min(plan.batch_rows or _AT_ONCE, _AT_ONCE)
    units = [rows[first : first + at_once] for first in range(0, rows.size, at_once)]
    learner.eval()
    with accelerator.autocast():
        learner.measure(
            {name: value.to(accelerator.device) for name, value in batches.batch(some).items()} for some in units
        )


def _optimizer(learner: Any, settings: Pretrain) -> Any:
    from mmtune.training.code_game import pace_of
    from mmtune.training.learner import part_of
    from mmtune.training.optimizer import USUAL, make_optimizer

    return make_optimizer(
        learner,
        name=settings.optimizer,
        rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        beta2=settings.beta2,
        tower_rates=settings.tower_rates,
        tower=part_of,
        pace=pace_of if "adversarial" in learner.settings.weights else lambda name: USUAL,
    )


def _identity(identity: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Returns what a checkpoint must share with the run: accumulation may change where as much makes a step."""
    config = identity["config"]
    own = {name: value for name, value in config["pretrain"].items() if name != "accumulate"}
    return {**identity, "config": {**config, "pretrain": own}, **found}


def _batching(
    recipe: Recipe, tokens: Manifest, processor: Any, split: str, size: Any, limit: int | None, told: Any
) -> Any:
    from mmtune.encoding.collate import Collator
    from mmtune.training.batching import Split, WithColumns, rows_apart, step_column
    from mmtune.training.data import soft_token_count, some_rows
    from mmtune.training.paired import PairCollator

    settings = recipe.pretrain
    assert settings is not None
    table = open_split(recipe.run_dir / "tokens" / split)
    table = some_rows(table, limit) if limit else table
    if table.num_rows == 0:
        raise DataError(f"tokens/{split} has no rows", "look at tokens/rejects.jsonl", "no_rows")
    if soft_token_count(table):
        raise DataError(
            "tokens/ has soft tokens, which are learned by finetune",
            "give pretrain templates without {soft: ...}",
            "soft_tokens",
        )
    course: dict[str, Any] = {"batch_tokens": size.batch_tokens, "batch_rows": size.batch_rows}
    if split == "train":
        own = {"epochs": settings.epochs, "max_steps": settings.max_steps, "micro_batches": size.micro_batches}
        course |= {"seed": recipe.seed, **own}
    else:
        course |= {"seed": 0, "epochs": 1.0, "micro_batches": 1}
    collate = Collator(processor, media_root=Path(tokens.facts["media_root"]))
    made: Any = rows_apart(Split(table, collate), course)
    rows = replace(made.batches, collate=PairCollator(made.batches.collate))
    batches: Any = WithColumns(rows, step_column)
    for one in told:
        batches = one.told(batches)
    return replace(made, batches=batches)


def _learner_settings(recipe: Recipe, settings: Pretrain, processor: Any, plan: Any, console: Talk) -> Any:
    """Returns what is minimised, with the parts that have a code and the steps for which towers stay frozen.

    Raises:
        RecipeError: Nothing of the model would train at the beginning, or a code has no second part.
    """
    from mmtune.training.learner import CODED, CodeSettings, LearnerSettings
    from mmtune.training.unfreezing import frozen_steps, said_of_stages

    parts = settings.codes.modalities or tuple(settings.build.encoders)
    if not settings.codes.modalities and len(parts) == 1:
        parts = (*parts, "text")
    for name in ("adversarial", "contrastive"):
        if name in settings.weights and len(parts) < 2:
            raise RecipeError(
                f"objective {name} needs codes of two parts, not of {', '.join(parts)} alone",
                "name two in pretrain.codes.modalities, of text and the encoders",
                "one_modality",
            )
    frozen = frozen_steps({TOWER_OF[part]: epochs for part, epochs in settings.unfreeze.items()}, plan)
    towers = {"llm", "projector", *(TOWER_OF[name] for name in settings.build.encoders)}
    trained = towers if settings.train == "all" else set(settings.train)
    if not trained - set(frozen):
        raise RecipeError(
            f"every tower that trains ({', '.join(sorted(trained))}) stays frozen at the beginning",
            "leave one out of pretrain.unfreeze, or add the projector to pretrain.train",
            "all_frozen",
        )
    for sentence in said_of_stages(frozen, plan.total_steps):
        console.say(f"pretrain: {sentence}")
    own = settings.codes
    codes = CodeSettings(
        parts if set(CODED) & set(settings.weights) else (),
        own.width,
        own.dropout,
        own.game == "alternating",
        own.form,
        own.noise,
        own.sources,
        own.feature_noise,
        own.sphere,
        own.gradient_penalty,
    )
    return LearnerSettings(settings.weights, codes, _masking(processor), recipe.seed, frozen)


def _masking(processor: Any) -> Any:
    from mmtune.encoding.processor import pad_token_id
    from mmtune.training.pair_losses import TextMasking

    tokenizer = processor.tokenizer
    mask = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else pad_token_id(processor)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return TextMasking(int(mask), len(tokenizer), tuple(sorted(special)))


def _check_rows(recipe: Recipe, settings: Any, together: Any, console: Talk) -> None:
    """Refuses objectives that no training row would teach anything.

    Raises:
        DataError: A part has no row, or an objective none with all that it compares.
    """
    import numpy as np

    from mmtune.training.packing import tree_modalities

    table = open_split(recipe.run_dir / "tokens" / "train")
    kinds, taught = tree_modalities(table), together.of_trees(table["example_ids"].to_pylist())
    parts, weights = settings.codes.parts, settings.weights
    # Every row has words.
    has = [
        taught & ((kinds & _KINDS[part]) > 0 if part in _KINDS else np.ones(kinds.size, dtype=bool)) for part in parts
    ]
    for part, rows in zip(parts, has, strict=True):
        if not rows.any():
            wanted = ", ".join(name for name in weights if name not in ("caption", "masked", "match"))
            raise DataError(
                f"no training row has {part}, which {wanted} needs",
                "add such rows, or leave it out of pretrain.codes.modalities",
                "no_such_media",
            )
    together = parts and int((np.sum(has, axis=0) > 1).sum()) > 1
    if parts and not together and "contrastive" in weights:
        raise DataError(
            f"objective contrastive needs rows with two of {', '.join(parts)}, and no two training rows have them",
            "add such rows, name other parts in pretrain.codes.modalities, or leave the objective out",
            "no_pairs",
        )
    if parts and not together and "adversarial" in weights:
        console.say(f"pretrain: no two rows have two of {', '.join(parts)}: adversarial learns to fill in no code")
    for name in ("masked", "match"):
        if name in weights and not kinds.any():
            raise DataError(
                f"objective {name} needs rows with media, and no training row has any",
                f"add such rows, or leave {name} out of pretrain.objectives",
                "no_such_media",
            )
