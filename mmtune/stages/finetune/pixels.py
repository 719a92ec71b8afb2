"""Processed images kept on disk, where the recipe asks for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmtune import __version__
from mmtune.recipe import Finetune
from mmtune.stages.finetune.features import REFUSALS, in_short, size_text
from mmtune.stages.finetune.wanted import MAKERS, agreed
from mmtune.storage import library_versions
from mmtune.talk import Talk

_GIB = 1 << 30
# A frame of a video also depends on its decoder.
_MAKERS = (*MAKERS, "av")


def use_pixels(
    settings: Finetune, folder: Path, processor: str, splits: Mapping[str, Any], accelerator: Any, console: Talk
) -> dict[str, Any]:
    """Returns the splits, with processed images from disk as far as the recipe gives room for them.

    Their tensors are the same to the last bit; a picture that is not there is decoded as ever.

    Args:
        settings: The recipe's finetune part.
        folder: Where the shards stand.
        processor: Fingerprint of the processor.
        splits: By name.
        accelerator: The accelerator.
        console: Where the estimate goes.
    """
    import torch

    from mmtune.features.levels import read_values
    from mmtune.training.frozen_features import DistinctMedia, Shelf
    from mmtune.training.kept_pixels import SHARD_BYTES, PixelMaker
    from mmtune.training.ranks import sum_tensor

    if settings.pixels_gib is None:
        return dict(splits)
    pictures = _pictures(settings, splits)
    if pictures.reason:
        console.note(f"no processed images are kept: {pictures.reason}")
        return dict(splits)
    collate = splits["train"].collate
    maker = PixelMaker(collate, collate.media_root)
    source = json.dumps({"made": "pixels", "processor": processor, **_versions()}, sort_keys=True)
    whole = Shelf(pictures, folder, source, 0.0, collate.media_root, SHARD_BYTES)
    count, one, problem = 0, 0, ""
    if accelerator.process_index == 0:
        count, one, problem = _room(settings.pixels_gib, whole, maker)
    # The first process decides: the room on a disk changes while others look.
    count, one = sum_tensor(torch.tensor([count, one], device=accelerator.device), "looking for room").tolist()
    some = DistinctMedia(pictures.items[:count], pictures.tokens[:count], pictures.trees, pictures.rows)
    shelf = replace(whole, media=some, row_bytes=one / pictures.tokens[0])
    if count:
        problem = _fill(shelf, len(pictures.items), maker, settings.workers, accelerator, console)
    if problem or not count:
        console.note(f"no processed images are kept: {problem or 'there is no room for one'}")
        return dict(splits)
    pixels = shelf.features(read_values)
    return {name: split.with_pixels(pixels) for name, split in splits.items()}


def _pictures(settings: Finetune, splits: Mapping[str, Any]) -> Any:
    """Returns the distinct images of all splits, or why none can be kept."""
    from mmtune.training.data import media_items
    from mmtune.training.frozen_features import DistinctMedia, distinct_media

    collate = splits["train"].collate
    token = collate.token_id("image")
    reason = "finetune.augment changes the pixels" if settings.augment else ""
    if not reason and token is None:
        reason = "the model sees no images"
    if not reason and not collate.joins_images:
        reason = "this family lays its images out by batch"
    if reason:
        return DistinctMedia([], [], 0, 0, reason)
    found = (one for split in splits.values() for one in media_items(split.table, "image", token))
    pictures = distinct_media(found)
    return pictures if pictures.items or pictures.reason else DistinctMedia([], [], 0, 0, "no row has an image")


def _versions() -> dict[str, str]:
    return {name: version for name, version in library_versions().items() if name in _MAKERS} | {"mmtune": __version__}


def _room(most_gib: float, whole: Any, maker: Any) -> tuple[int, int, str]:
    """Returns how many images there is room for, the bytes of the first one, and what is wrong."""
    from mmtune.training.kept_pixels import first_that_fit

    items, tokens = whole.media.items, whole.media.tokens
    try:
        one = maker.size_bytes(items[0], tokens[0])
    except REFUSALS as refusal:
        return 0, 0, in_short(refusal)
    shelf = replace(whole, row_bytes=one / tokens[0])
    place = next(path for path in (shelf.folder, *shelf.folder.parents) if path.is_dir())
    there = shelf.size_bytes() - shelf.size_bytes(shelf.missing())
    room = min(most_gib * _GIB, there + 0.9 * shutil.disk_usage(place).free)
    return first_that_fit(tokens, shelf.row_bytes, room), one, ""


def _fill(shelf: Any, wanted: int, maker: Any, workers: int, accelerator: Any, console: Talk) -> str:
    """Processes what is not on disk yet, shared among the processes of the run; returns what went wrong."""
    from mmtune.training.kept_pixels import fill

    rank, world = accelerator.process_index, accelerator.num_processes
    missing = shelf.missing()
    kept, new = len(shelf.media.items), sum(map(len, missing.values()))
    console.say(
        f"finetune: {kept:,} of {wanted:,} images, processed, take {size_text(shelf.size_bytes())} on disk;"
        f" {new:,} of them are made now"
    )
    mine = {number: own for number, own in missing.items() if number % world == rank}
    problem = ""
    with console.progress(sum(map(len, mine.values())), "pixels") as bar:
        try:
            fill(shelf, maker, mine, workers, bar.advance)
        except REFUSALS as refusal:
            problem = in_short(refusal)
    problem = agreed(problem, "processing images", accelerator)
    if rank == 0 and not problem:
        shelf.remove_others()
    return problem
