"""Whether a frozen vision tower runs once per image or at every step, and the features of the first case."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmtune.errors import CapabilityError, ResourceError
from mmtune.recipe import Features, Finetune
from mmtune.storage import library_versions
from mmtune.talk import Talk

_GIB = 1 << 30
# Relative difference of a loss with features and with pixels, by what the features are kept in.
_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}
_BYTES = {"fp32": 4, "bf16": 2}
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
    from mmtune.models.image_features import release_image_towers
    from mmtune.training.frozen_features import Shelf, feature_error

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
    versions = {name: library_versions().get(name) for name in ("torch", "transformers")}
    source = {**made_from, **versions, "dtype": dtype, "precision": precision, "device": accelerator.device.type}
    root = splits["train"].collate.media_root
    shelf = Shelf(pictures, folder, json.dumps(source, sort_keys=True), row_bytes, root)
    if not _worth_it(wish, shelf, live.plan, console):
        return dict(splits)
    problem = _fill(shelf, model, splits["train"].collate, dtype, accelerator, console)
    if not problem:
        features = shelf.features()
        kept = {name: split.with_features(features) for name, split in splits.items()}
        error = feature_error(model, live, make(kept["train"], "train"), accelerator)
        if error <= _TOLERANCE[dtype]:
            if settings.method != "full":
                release_image_towers(model)
            console.say(f"finetune: features stand for pixels; the loss of a batch differs by {error:.0e} of 1")
            return kept
        problem = f"the loss of a batch with features differs by {error:.0e} of 1"
    if wish.use == "on":
        raise CapabilityError(f"features cannot stand for pixels: {problem}", "set finetune.features.use: auto")
    console.note(f"the frozen vision tower runs at every step: {problem}")
    return dict(splits)


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
    row_bytes = feature_width(model) * collate.rows_per_image_token * _BYTES[dtype]
    return distinct_pictures(found, as_trees=as_trees), row_bytes


def _worth_it(wish: Features, shelf: Any, plan: Any, console: Talk) -> bool:
    """Prints the estimate and decides; with ``use: on`` only a full disk is a reason against it."""
    distinct, size = len(shelf.pictures.items), shelf.size_bytes
    epochs = plan.total_steps * plan.micro_batches / len(plan.epoch_batches(0))
    runs = max(round(shelf.pictures.runs * epochs), 1)
    console.say(
        f"finetune: features of {distinct:,} images take {_size(size)}; with them the frozen vision tower runs"
        f" {distinct:,} times, without about {runs:,}"
    )
    place = next(path for path in (shelf.folder, *shelf.folder.parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if size > free * 0.9:
        problem = f"{place} has {_size(free)} free"
        if wish.use == "on":
            raise ResourceError(f"the features take {_size(size)}, {problem}", "free some space")
        console.note(f"no features are kept: {problem}")
        return False
    if wish.use == "on":
        return True
    if size > wish.most_gib * _GIB:
        console.note(f"no features are kept: finetune.features.most_gib is {wish.most_gib:g}")
        return False
    return runs >= _LEAST_RUNS * distinct


def _fill(shelf: Any, model: Any, collate: Any, dtype: str, accelerator: Any, console: Talk) -> str:
    """Computes what is not on disk yet, shared among the processes; returns what went wrong."""
    import torch

    from mmtune.training.frozen_features import Maker
    from mmtune.training.ranks import sum_tensor, wait_for_all

    missing = shelf.missing()
    wait_for_all("looking for features")
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = {number: own for number, own in missing.items() if number % world == rank}
    kept_as = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    maker = Maker(model, collate, shelf.root, kept_as, accelerator.device, accelerator.autocast)
    problem = ""
    if mine:
        with console.progress(sum(map(len, mine.values())), "features") as bar:
            try:
                shelf.fill(maker, mine, bar.advance)
            except (ValueError, RuntimeError, TypeError) as error:
                # A family may refuse in any of these ways; its tower then runs at every step.
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
    failed = sum_tensor(torch.tensor([float(bool(problem))], device=accelerator.device), "making features")
    if rank == 0 and not failed:
        shelf.remove_others()
    return problem or ("another process could not make them" if failed else "")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
