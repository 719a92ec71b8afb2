"""How rows become batches: apart or packed as trees, with features or images kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from mmtune.recipe import Finetune, Recipe
from mmtune.stages.finetune.features import Means, use_features
from mmtune.stages.finetune.pixels import use_pixels
from mmtune.stages.finetune.wanted import with_proved
from mmtune.storage import Manifest
from mmtune.talk import Talk

# Rows that share nothing are packed when padding would take more than this share of the tokens.
_LEAST_PADDING = 0.1


@dataclass(frozen=True)
class Ground:
    """What there is before the model is loaded.

    Attributes:
        precision: Of the training.
        accelerator: The processes, met.
        processor: That of tokens/.
        splits: By name.
        wanted: Features of media that may stand in a tower's place.
        load: Loads the base model.
    """

    precision: str
    accelerator: Any
    processor: Any
    splits: dict[str, Any]
    wanted: Any
    load: Callable[..., Any]


@dataclass(frozen=True)
class Batched:
    """How rows become batches.

    Attributes:
        train: The batching of training rows.
        validate: That of held-out rows, or None.
        as_trees: Rows are packed.
        features: Kinds of media whose features are kept.
        load: Loads the base model, whole where a tower was left out.
    """

    train: Any
    validate: Any
    as_trees: bool
    features: Any
    load: Callable[..., Any]


def step_size(settings: Finetune, processes: int) -> Any:
    """Returns how much makes a step by the settings and so many processes."""
    from mmtune.training.step_size import LIMITS, StepSize

    return StepSize(processes * settings.accumulate, **{name: getattr(settings, name) for name in LIMITS})


def said_of_steps(own: Any, processes: int, newest: Any) -> str:
    """Returns how the steps of a checkpoint go on in micro batches of this run's own size, or in as many; else empty.

    Args:
        own: See ``step_size``.
        processes: That train.
        newest: The identity of the checkpoint that is gone on from, or None.
    """
    from mmtune.training.step_size import StepSize

    if not newest:
        return ""
    before, count = StepSize(**newest["step_size"]), own.micro_batches
    like, other = before.micro_batches_like(own), before.in_micro_batches(count)
    if like and like != count and like % processes == 0:
        return f" (its steps go on with finetune.accumulate={like // processes})"
    if other is None or other == own:
        return ""
    limits = ", ".join(f"finetune.{name}={limit}" for name, limit in other.limits().items() if limit is not None)
    return f" (its steps go on with {limits})"


def batched(
    recipe: Recipe,
    settings: Finetune,
    tokens: Manifest,
    model: Any,
    ground: Ground,
    sizes: tuple[Any, Any],
    console: Talk,
) -> Batched:
    """Decides how rows become batches.

    Args:
        recipe: The recipe.
        settings: Its finetune part.
        tokens: The manifest of tokens/.
        model: On its device.
        ground: What there was before it.
        sizes: How much makes a step by the settings, and by how much the run is planned, see ``planned_size``.
        console: Where notes go.
    """
    from mmtune.training.batching import packed_trees, rows_apart

    accelerator, splits = ground.accelerator, ground.splits
    own_size, size = sizes
    rows = _batching_of(rows_apart, recipe, settings, size, own_size)
    train = with_proved(splits, ground.wanted)["train"]
    attn = recipe.model.attn if recipe.model else "auto"
    as_trees = _trains_trees(model, train, rows(train, "train").plan, attn, accelerator, console)
    make = _batching_of(partial(packed_trees, model), recipe, settings, size, own_size) if as_trees else rows
    whole = partial(ground.load, whole=True)
    means = Means(settings, ground.precision, model, make, as_trees, whole, accelerator, console)
    kept, kinds = use_features(ground.wanted, splits, means)
    if "image" not in kinds:
        shelves = recipe.run_dir / "features" / "pixels"
        kept = use_pixels(settings, shelves, str(tokens.facts["processor"]), kept, accelerator, console)
    held_out = make(kept["val"], "val") if "val" in kept else None
    return Batched(make(kept["train"], "train"), held_out, as_trees, kinds, means.load)


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
