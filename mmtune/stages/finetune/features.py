"""Whether a frozen tower runs once per medium or at every step, and the features of the first case."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmtune.errors import CapabilityError, ResourceError
from mmtune.recipe import Features, Finetune
from mmtune.stages.finetune.wanted import TOWERS, Wanted, agreed
from mmtune.talk import Talk

_GIB = 1 << 30
# Relative difference of a loss with features and with media.
_EXACT, _COARSE = 1e-5, 1e-3
# A family may refuse features in any of these ways; its tower then runs at every step.
REFUSALS = (ValueError, RuntimeError, TypeError, LookupError, AttributeError)
# A tower that runs less often than this per medium is not worth a file.
_LEAST_RUNS = 1.5
_MEDIA = {"image": "images", "audio": "sounds"}
_LIVE = {"image": "pixels", "audio": "sounds"}


@dataclass(frozen=True)
class Means:
    """What decides about features and makes them.

    Attributes:
        settings: The recipe's finetune part.
        precision: Of the training.
        model: The model, on its device; a tower of ``Wanted.found`` is not in it.
        make: A split and its name to its batching.
        as_trees: Whether rows that share a medium train as one tree.
        load: Loads the model again, less the weights that its argument names.
        accelerator: The accelerator.
        console: Where the estimate goes.
    """

    settings: Finetune
    precision: str
    model: Any
    make: Callable[[Any, str], Any]
    as_trees: bool
    load: Callable[[Any], Any]
    accelerator: Any
    console: Talk


def use_features(wanted: Sequence[Wanted], splits: Mapping[str, Any], means: Means) -> tuple[dict[str, Any], list[str]]:
    """Returns the splits with features in place of media where the recipe wants it and they prove equal, and the kinds.

    The towers then leave the memory.

    Args:
        wanted: What could be used.
        splits: By name, without features.
        means: What decides and makes.

    Raises:
        CapabilityError: ``use: on`` where features cannot stand for media.
        ResourceError: ``use: on`` without room on the disk.
    """
    from mmtune.models.linear import fused_linears

    kept, kinds = dict(splits), []
    # A tower that is not loaded must not be asked while another one is compared.
    for one in sorted(wanted, key=lambda one: one.found is None):
        if one.found:
            taken = _proved_before(one, kept, means)
        else:
            with fused_linears(means.model):
                taken = _made_now(one, kept, means)
        if taken is not None:
            kept = taken
            kinds.append(one.kind)
    return kept, kinds


def _proved_before(wanted: Wanted, splits: dict[str, Any], means: Means) -> dict[str, Any] | None:
    from mmtune.models.left_out import bring_back

    assert wanted.found is not None
    row_bytes, difference = wanted.found
    shelf = wanted.shelf(row_bytes, splits["train"].collate.media_root)
    if not _worth_it(wanted, shelf, {}, 0.0, splits, means):
        bring_back(means.model, means.load, {wanted.kind})
        return None
    means.console.say(
        f"finetune: features stand for {_LIVE[wanted.kind]}, as an earlier run found (the loss of a batch differs by"
        f" {difference:.0e} of 1); the {TOWERS[wanted.kind]} tower is not loaded"
    )
    return {name: split.with_features(wanted.kind, shelf.features()) for name, split in splits.items()}


def _made_now(wanted: Wanted, splits: dict[str, Any], means: Means) -> dict[str, Any] | None:
    from mmtune.models.encoder_outputs import takes_none

    maker, seconds = _maker(wanted, splits, means), 0.0
    shelf: Any = None
    missing: dict[int, range] = {}
    problem = takes_none(means.model, wanted.kind)
    if not problem:
        try:
            row_bytes, seconds = maker.row_bytes(wanted.media.items, wanted.media.tokens)
            shelf = wanted.shelf(row_bytes, maker.root)
            missing = shelf.missing()
        except REFUSALS as refusal:
            problem = in_short(refusal)
        problem = agreed(problem, "running a tower", means.accelerator)
    if not problem:
        if not _worth_it(wanted, shelf, missing, seconds, splits, means):
            return None
        problem = _fill(shelf, missing, maker, means)
    if not problem:
        kept = {name: split.with_features(wanted.kind, shelf.features()) for name, split in splits.items()}
        problem, error = _difference(wanted, splits["train"], kept["train"], means)
        if not problem:
            if means.accelerator.is_main_process:
                shelf.prove(error)
            live = _LIVE[wanted.kind]
            means.console.say(f"finetune: features stand for {live}; the loss of a batch differs by {error:.0e} of 1")
            return kept
    if means.settings.features.use == "on":
        raise CapabilityError(
            f"features cannot stand for {_LIVE[wanted.kind]}: {problem}", "set finetune.features.use: auto"
        )
    means.console.note(f"the frozen {TOWERS[wanted.kind]} tower runs at every step: {problem}")
    return None


def _maker(wanted: Wanted, splits: Mapping[str, Any], means: Means) -> Any:
    import torch

    from mmtune.training.frozen_features import Maker

    collate, kept_as = splits["train"].collate, {"fp32": torch.float32, "bf16": torch.bfloat16}[wanted.dtype]
    return Maker(
        means.model,
        wanted.kind,
        wanted.before_projector,
        collate,
        collate.media_root,
        kept_as,
        means.accelerator.device,
        means.accelerator.autocast,
    )


def _worth_it(
    wanted: Wanted, shelf: Any, missing: Mapping[int, range], seconds: float, splits: Mapping[str, Any], means: Means
) -> bool:
    """Prints the estimate and decides; with ``use: on`` only a full disk is a reason against it."""
    wish: Features = means.settings.features
    plan = means.make(splits["train"], "train").plan
    distinct, size = len(shelf.media.items), shelf.size_bytes()
    epochs = plan.total_steps * plan.micro_batches / len(plan.epoch_batches(0))
    runs = max(round((shelf.media.trees if means.as_trees else shelf.media.rows) * epochs), 1)
    each = f" ({1000 * seconds:.0f} ms for the first)" if seconds else ""
    means.console.say(
        f"finetune: features of {distinct:,} {_MEDIA[wanted.kind]} take {size_text(size)}; with them the frozen"
        f" {TOWERS[wanted.kind]} tower runs {distinct:,} times{each}, without about {runs:,}"
    )
    place = next(path for path in (shelf.folder, *shelf.folder.parents) if path.is_dir())
    need, free = shelf.size_bytes(missing), shutil.disk_usage(place).free
    problem = f"{place} has {size_text(free)} free, {size_text(need)} are needed" if need > free * 0.9 else ""
    problem = agreed(problem, "looking for room", means.accelerator)
    if problem and wish.use == "on":
        raise ResourceError(f"no room for features: {problem}", "free some space")
    if not problem and size > wish.most_gib * _GIB and wish.use == "auto":
        problem = f"finetune.features.most_gib is {wish.most_gib:g}"
    if problem:
        means.console.note(f"no features are kept: {problem}")
        return False
    worth = wish.use == "on" or runs >= _LEAST_RUNS * distinct
    if not worth:
        rule = f"features pay where {_MEDIA[wanted.kind]} are seen {_LEAST_RUNS:g} times or more"
        means.console.say(f"finetune: it goes on without them; {rule}")
    return worth


def _fill(shelf: Any, missing: Mapping[int, range], maker: Any, means: Means) -> str:
    """Computes what is not on disk yet, shared among the processes; returns what went wrong."""
    rank, world = means.accelerator.process_index, means.accelerator.num_processes
    mine = {number: own for number, own in missing.items() if number % world == rank}
    problem = ""
    if mine:
        with means.console.progress(sum(map(len, mine.values())), "features") as bar:
            try:
                shelf.fill(maker, mine, bar.advance)
            except REFUSALS as refusal:
                problem = in_short(refusal)
    problem = agreed(problem, "making features", means.accelerator)
    if rank == 0 and not problem:
        shelf.remove_others()
    return problem


def _difference(wanted: Wanted, live: Any, kept: Any, means: Means) -> tuple[str, float]:
    """Compares features with media on a released model; returns what is wrong, and the relative difference."""
    from mmtune.models.left_out import put_back, release
    from mmtune.training.frozen_features import batch_loss

    problem, error = "", float("nan")
    released: list[Any] = []
    limit = _EXACT if wanted.dtype == means.precision == "fp32" else _COARSE
    try:
        expected = batch_loss(means.model, means.make(live, "train"), wanted.kind, means.accelerator)
        released = release(means.model, {wanted.kind}, with_projector=not wanted.before_projector)
        found = batch_loss(means.model, means.make(kept, "train"), wanted.kind, means.accelerator)
        error = abs(found - expected) / max(abs(expected), 1e-12)
        if not error <= limit:
            problem = f"the loss of a batch with features differs by {error:.0e} of 1"
    except REFUSALS as refusal:
        problem = in_short(refusal)
    problem = agreed(problem, "comparing features", means.accelerator)
    # Random weights cannot be read again when the whole model is saved.
    if problem or means.settings.from_scratch:
        put_back(released)
    return problem, error


def in_short(error: Exception) -> str:
    """Returns the first line of an error, with its kind where that line is no sentence."""
    text = str(error).strip()
    return text.splitlines()[0] if " " in text else f"{type(error).__name__}: {text}"


def size_text(count: float) -> str:
    """Returns a number of bytes as a person reads it."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
