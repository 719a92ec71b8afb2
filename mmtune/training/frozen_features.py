"""The features of a frozen vision tower, computed once for all steps, and the check that they stand for its pixels.

Shapes: N image tokens, H model width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmtune.features.shards import (
    Features,
    Item,
    Member,
    cut,
    is_fresh,
    item_name,
    read_members,
    read_rows,
    shard_path,
    stand_of,
    write_shard,
)
from mmtune.models.image_features import image_features

if TYPE_CHECKING:
    from mmtune.encoding.collate import Collator
    from mmtune.training.batching import Batching

# Image tokens that the tower takes at once; a part of what the features are to the last bit.
_TOKENS_AT_ONCE = 4096
Make = Callable[[Sequence[Item], Sequence[int]], tuple[list[Member], dict[str, torch.Tensor]]]
"""Items and the tokens expected of each, to the members and tensors of a shard."""


@dataclass(frozen=True)
class Pictures:
    """The distinct images of some splits.

    Attributes:
        items: In the order of their first use.
        tokens: Image tokens of each.
        runs: How often an epoch would run the tower on an image.
        reason: Why features cannot stand for them, or empty.
    """

    items: list[Item]
    tokens: list[int]
    runs: int
    reason: str = ""


def distinct_pictures(found: Iterable[tuple[Item, int, int]], *, as_trees: bool) -> Pictures:
    """Gathers what ``data.image_items`` yields.

    Args:
        found: Item, image tokens and rows.
        as_trees: Whether rows that share an image train as one tree.
    """
    tokens: dict[str, int] = {}
    items: list[Item] = []
    runs: Counter[bool] = Counter()
    for item, count, rows in found:
        if item.medium.data is not None:
            return Pictures([], [], 0, "the images are embedded in tokens/")
        name = item_name(item)
        if name not in tokens:
            tokens[name] = count
            items.append(item)
        elif tokens[name] != count:
            return Pictures([], [], 0, f"{item.medium.path} takes {tokens[name]} tokens in one row, {count} in another")
        runs[True] += 1 if as_trees else rows
    return Pictures(items, [tokens[item_name(item)] for item in items], runs[True])


@dataclass(frozen=True)
class Maker:
    """What makes features.

    Attributes:
        model: The model, its towers in place.
        collate: For the pictures.
        root: Folder of the media.
        dtype: What features are kept in; None as the model makes them.
        device: Where the model is.
        autocast: As in training.
    """

    model: Any
    collate: Collator
    root: Path
    dtype: torch.dtype | None
    device: torch.device
    autocast: Callable[[], Any]

    def make(self, items: Sequence[Item], expected: Sequence[int]) -> tuple[list[Member], dict[str, torch.Tensor]]:
        """Returns members and tensors of one shard.

        Raises:
            ValueError: The tower makes another number of rows than there are tokens.
            MediaRefused: A file is gone or damaged.
        """
        members: list[Member] = []
        parts: list[dict[str, torch.Tensor]] = []
        at = 0
        for own in _batches(expected):
            some = [items[index] for index in own]
            made, tokens = self.collate.processed(some)
            if tokens != [expected[index] for index in own]:
                raise ValueError("an image alone takes another number of tokens than in its row")
            parts.append(self._run(made))
            rows, wide = len(next(iter(parts[-1].values()))), self.collate.rows_per_image_token
            if rows != sum(tokens) * wide:
                raise ValueError(f"the tower makes {rows} rows of {sum(tokens)} tokens")
            grids = made["image_grid_thw"].tolist() if "image_grid_thw" in made else [()] * len(some)
            for item, count, grid in zip(some, tokens, grids, strict=True):
                stand = stand_of(item, self.root)
                members.append(Member(item_name(item), *stand, at, count * wide, count, tuple(grid)))
                at += count * wide
        return members, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _run(self, made: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        training = self.model.training
        self.model.eval()
        try:
            with self.autocast():
                found = image_features(self.model, {name: value.to(self.device) for name, value in made.items()})
        finally:
            self.model.train(training)
        return {name: value.to(self.dtype or value.dtype).cpu() for name, value in found.items()}


def _batches(tokens: Sequence[int]) -> Iterable[range]:
    first = held = 0
    for index, count in enumerate(tokens):
        if held and held + count > _TOKENS_AT_ONCE:
            yield range(first, index)
            first, held = index, 0
        held += count
    if held:
        yield range(first, len(tokens))


@dataclass(frozen=True)
class Shelf:
    """The shards of some pictures.

    Attributes:
        pictures: What they hold.
        folder: Where they stand.
        source: What makes the features.
        row_bytes: Bytes of one image token's features.
        root: Folder of the media.
        shard_bytes: Most bytes of a shard; None for the usual size.
    """

    pictures: Pictures
    folder: Path
    source: str
    row_bytes: float
    root: Path
    shard_bytes: int | None = None

    def size_bytes(self, numbers: Iterable[int] | None = None) -> int:
        """Returns what some shards, or all of them, take on the disk, their headers apart."""
        shards = self._shards
        wanted = range(len(shards)) if numbers is None else numbers
        return round(sum(self.pictures.tokens[at] for number in wanted for at in shards[number]) * self.row_bytes)

    def missing(self) -> dict[int, range]:
        """Returns the numbers and items of the shards that are absent or no longer true."""
        return {
            number: own
            for number, own in enumerate(self._shards)
            if not is_fresh(
                read_members(shard_path(self.folder, number), self.source),
                [self.pictures.items[index] for index in own],
                self.root,
            )
        }

    def fill(self, maker: Maker, missing: Mapping[int, range], advance: Callable[[int], None]) -> None:
        """Computes and writes some shards, one after the other.

        Raises:
            ValueError: As ``Maker.make``.
        """
        for number, own in missing.items():
            self.write(maker.make, number, own)
            advance(len(own))

    def write(self, make: Make, number: int, own: range) -> None:
        """Computes and writes one shard."""
        items, tokens = self.pictures.items, self.pictures.tokens
        members, tensors = make([items[at] for at in own], [tokens[at] for at in own])
        write_shard(shard_path(self.folder, number), self.source, members, tensors)

    def features(self, read: Callable[[Any, slice], dict[str, torch.Tensor]] = read_rows) -> Features:
        """Returns the features of all pictures; ``read`` as in ``Features``."""
        return Features([shard_path(self.folder, number) for number in range(self._count)], self.source, read)

    def remove_others(self) -> None:
        """Deletes shards beyond those of the pictures, and what a killed run left half-written."""
        known = {shard_path(self.folder, number) for number in range(self._count)}
        for file in {*self.folder.glob("shard-*"), *self.folder.glob(".shard-*")} - known:
            file.unlink(missing_ok=True)

    @property
    def _count(self) -> int:
        return len(self._shards)

    @property
    def _shards(self) -> list[range]:
        return cut(self.pictures.tokens, self.row_bytes, self.shard_bytes)


def batch_loss(model: Any, batching: Batching, accelerator: Any) -> float:
    """Returns the loss of the first micro batch with images, the model in evaluation mode."""
    batches = batching.plan.run_batches(0)
    units = next((own for own in batches if {"image", "video"} & batching.batches.modalities(own)), batches[0])
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), accelerator.autocast():
            batch = {name: value.to(accelerator.device) for name, value in batching.batches.batch(units).items()}
            return float(batching.loss(model, batch)[0])
    finally:
        model.train(training)
