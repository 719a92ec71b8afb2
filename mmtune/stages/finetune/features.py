"""Whether a frozen vision tower runs once per image or at every step, and the features of the first case."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmtune import __version__
from mmtune.errors import CapabilityError, ResourceError
from mmtune.recipe import Features, Finetune
from mmtune.storage import library_versions
from mmtune.talk import Talk

_GIB = 1 << 30
# Relative difference of a loss with features and with pixels, by what the features are kept in.
_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}
_BYTES = {"fp32": 4, "bf16": 2}
# What a feature depends on beside the weights.
MAKERS = ("torch", "transformers", "pillow", "torchvision")
# A family may refuse features in any of these ways; its tower then runs at every step.
REFUSALS = (ValueError, RuntimeError, TypeError, LookupError, AttributeError)
# A tower that runs less often than this per image is not worth a file.
_LEAST_RUNS = 1.5


def use_features(
    settings: Finetune,
    folder: Path,
    made_from: Mapping[str, Any],
    model: Any,
    splits: Mapping[str, Any],
    make: Callable[[Any, str], Any],
    *,
    as_trees: bool,
    precision: str,
    accelerator: Any,
    console: Talk,
) -> dict[str, Any]:
    """Returns the splits, with features in place of pixels where the recipe wants it and they prove equal.

    The model's vision tower and projector then leave the memory.

    Args:
        settings: The recipe's finetune part.
        folder: Where the shards stand.
        made_from: What the features depend on, as plain values.
        model: The model, on its device.
        splits: By name.
        make: A split and its name to its batching.
        as_trees: Whether rows that share an image train as one tree.
        precision: Of the training.
        accelerator: The accelerator.
        console: Where the estimate goes.

    Raises:
        CapabilityError: ``use: on`` where features cannot stand for pixels.
        ResourceError: ``use: on`` without room on the disk.
    """
    from mmtune.models.image_features import tower_types
    from mmtune.training.frozen_features import Shelf

    wish = settings.features
    if wish.use == "off":
        return dict(splits)
    live = make(splits["train"], "train")
    dtype = precision if wish.dtype == "auto" else wish.dtype
    pictures, row_bytes = _pictures(settings, model, splits, as_trees, dtype)
    if pictures.reason:
        if wish.use == "on":
            raise CapabilityError(f"finetune.features.use is on, but {pictures.reason}", "set it to auto")
        return dict(splits)
    source = {
        **made_from,
        **{name: version for name, version in library_versions().items() if name in MAKERS},
        "mmtune": __version__,
        "tower": tower_types(model),
        "dtype": dtype,
        "precision": precision,
        "device": accelerator.device.type,
    }
    root = splits["train"].collate.media_root
    shelf = Shelf(pictures, folder, json.dumps(source, sort_keys=True), row_bytes, root)
    missing = shelf.missing()
    if not _worth_it(wish, shelf, missing, live.plan, accelerator, console):
        return dict(splits)
    problem = _fill(shelf, missing, model, splits["train"].collate, dtype, accelerator, console)
    if not problem:
        features = shelf.features()
        kept = {name: split.with_features(features) for name, split in splits.items()}
        problem, error = _difference(model, live, make(kept["train"], "train"), dtype, settings, accelerator)
        if not problem:
            console.say(f"finetune: features stand for pixels; the loss of a batch differs by {error:.0e} of 1")
            return kept
    if wish.use == "on":
        raise CapabilityError(f"features cannot stand for pixels: {problem}", "set finetune.features.use: auto")
    console.note(f"the frozen vision tower runs at every step: {problem}")
    return dict(splits)


def _difference(
    model: Any, live: Any, kept: Any, dtype: str, settings: Finetune, accelerator: Any
) -> tuple[str, float]:
    """Compares features with pixels on a released model; returns what is wrong, and the relative difference."""
    from mmtune.models.image_features import put_back, release_image_towers
    from mmtune.training.frozen_features import batch_loss

    problem, error = "", float("nan")
    released = []
    try:
        expected = batch_loss(model, live, accelerator)
        released = release_image_towers(model)
        found = batch_loss(model, kept, accelerator)
        error = abs(found - expected) / max(abs(expected), 1e-12)
        if not error <= _TOLERANCE[dtype]:
            problem = f"the loss of a batch with features differs by {error:.0e} of 1"
    except REFUSALS as refusal:
        problem = in_short(refusal)
    problem = agreed(problem, "comparing features", accelerator)
    # A whole model is saved after full tuning, with the towers that did not train.
    if problem or settings.method == "full":
        put_back(released)
    return problem, error


def agreed(problem: str, what: str, accelerator: Any) -> str:
    """Returns the problem of this process, or of another one."""
    import torch

    from mmtune.training.ranks import sum_tensor

    failed = sum_tensor(torch.tensor([float(bool(problem))], device=accelerator.device), what)
    return problem or ("another process of the run refused" if failed else "")


def in_short(error: Exception) -> str:
    """Returns the first line of an error."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _pictures(settings: Finetune, model: Any, splits: Mapping[str, Any], as_trees: bool, dtype: str) -> tuple[Any, int]:
    """Returns the distinct images of all splits, or why there are none to keep, and the bytes of one token."""
    from mmtune.models.image_features import feature_width, trains_on_pixels
    from mmtune.training.data import image_items
    from mmtune.training.frozen_features import Pictures, distinct_pictures

    collate = splits["train"].collate
    reason = "finetune.augment changes the pixels" if settings.augment else trains_on_pixels(model)
    if reason or collate.image_token_id is None:
        return Pictures([], [], 0, reason or "the model sees no images"), 0
    found = (one for split in splits.values() for one in image_items(split.table, collate.image_token_id))
    pictures = distinct_pictures(found, as_trees=as_trees)
    if not (pictures.items or pictures.reason):
        return Pictures([], [], 0, "no row has an image"), 0
    return pictures, feature_width(model) * collate.rows_per_image_token * _BYTES[dtype]


def _worth_it(
    wish: Features, shelf: Any, missing: Mapping[int, range], plan: Any, accelerator: Any, console: Talk
) -> bool:
    """Prints the estimate and decides; with ``use: on`` only a full disk is a reason against it."""
    distinct, size = len(shelf.pictures.items), shelf.size_bytes()
    epochs = plan.total_steps * plan.micro_batches / len(plan.epoch_batches(0))
    runs = max(round(shelf.pictures.runs * epochs), 1)
    console.say(
        f"finetune: features of {distinct:,} images take {size_text(size)}; with them the frozen vision tower runs"
        f" {distinct:,} times, without about {runs:,}"
    )
    place = next(path for path in (shelf.folder, *shelf.folder.parents) if path.is_dir())
    need, free = shelf.size_bytes(missing), shutil.disk_usage(place).free
    problem = f"{place} has {size_text(free)} free, {size_text(need)} are needed" if need > free * 0.9 else ""
    problem = agreed(problem, "looking for room", accelerator)
    if problem and wish.use == "on":
        raise ResourceError(f"no room for features: {problem}", "free some space")
    if not problem and size > wish.most_gib * _GIB and wish.use == "auto":
        problem = f"finetune.features.most_gib is {wish.most_gib:g}"
    if problem:
        console.note(f"no features are kept: {problem}")
        return False
    return wish.use == "on" or runs >= _LEAST_RUNS * distinct


def _fill(
    shelf: Any,
    missing: Mapping[int, range],
    model: Any,
    collate: Any,
    dtype: str,
    accelerator: Any,
    console: Talk,
) -> str:
    """Computes what is not on disk yet, shared among the processes; returns what went wrong."""
    import torch

    from mmtune.training.frozen_features import Maker

    rank, world = accelerator.process_index, accelerator.num_processes
    mine = {number: own for number, own in missing.items() if number % world == rank}
    kept_as = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    maker = Maker(model, collate, shelf.root, kept_as, accelerator.device, accelerator.autocast)
    problem = ""
    if mine:
        with console.progress(sum(map(len, mine.values())), "features") as bar:
            try:
                shelf.fill(maker, mine, bar.advance)
            except REFUSALS as refusal:
                problem = in_short(refusal)
    problem = agreed(problem, "making features", accelerator)
    if rank == 0 and not problem:
        shelf.remove_others()
    return problem


def size_text(count: float) -> str:
    """Returns a number of bytes as a person reads it."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
