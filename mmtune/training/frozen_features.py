"""The outputs of a frozen tower, computed once for all steps, and the check that they stand for its media.

Shapes: N media tokens, U units of a projector.
"""

from __future__ import annotations

import json
import time
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
    is_whole,
    item_name,
    joined_features,
    read_members,
    read_rows,
    shard_path,
    stand_of,
    write_shard,
)
from mmtune.files import write_json
from mmtune.models.encoder_outputs import encoder_outputs
from mmtune.models.spread import without_gradients

if TYPE_CHECKING:
    from mmtune.encoding.collate import Collator
    from mmtune.training.batching import Batching

# Media tokens that the tower takes at once; a part of what the features are to the last bit.
_TOKENS_AT_ONCE = 4096
# What a shelf says of its shards.
_PROOF = "proof.json"
_MODALITIES = {"image": {"image", "video"}, "audio": {"audio"}}
Make = Callable[[Sequence[Item], Sequence[int]], tuple[list[Member], dict[str, torch.Tensor]]]
"""Items and the tokens expected of each, to the members and tensors of a shard."""


@dataclass(frozen=True)
class DistinctMedia:
    """The distinct media of a kind in some splits.

    Attributes:
        items: In the order of their first use.
        tokens: Media tokens of each.
        trees: How often an epoch would run the tower on one where rows that share it train as one tree.
        rows: How often where each row trains apart.
        reason: Why features cannot stand for them, or empty.
    """

    items: list[Item]
    tokens: list[int]
    trees: int
    rows: int
    reason: str = ""


def distinct_media(found: Iterable[tuple[Item, int, int]]) -> DistinctMedia:
    """Gathers what ``data.media_items`` yields: item, media tokens and rows."""
    tokens: dict[str, int] = {}
    items: list[Item] = []
    trees = rows = 0
    for item, count, seen_by in found:
        if item.medium.data is not None:
            return DistinctMedia([], [], 0, 0, "the media are embedded in tokens/")
        name = item_name(item)
        if name not in tokens:
            tokens[name] = count
            items.append(item)
        elif tokens[name] != count:
            reason = f"{item.medium.path} takes {tokens[name]} tokens in one row, {count} in another"
            return DistinctMedia([], [], 0, 0, reason)
        trees, rows = trees + 1, rows + seen_by
    return DistinctMedia(items, [tokens[item_name(item)] for item in items], trees, rows)


@dataclass(frozen=True)
class Maker:
    """What makes features.

    Attributes:
        model: The model, its towers in place.
        kind: ``image`` or ``audio``.
        before_projector: Keep what enters the projector, which trains.
        collate: For the media.
        root: Folder of the media.
        dtype: What features are kept in; None as the model makes them.
        device: Where the model is.
        autocast: As in training.
    """

    model: Any
    kind: str
    before_projector: bool
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
        for own in _batches(expected):
            some = [items[index] for index in own]
            made, tokens = self.collate.processed(some)
            if tokens != [expected[index] for index in own]:
                raise ValueError(f"an {self.kind} alone takes another number of tokens than in its row")
            parts.append(self._run(made, sum(tokens) * self.collate.rows_per_token(self.kind)))
            at = members[-1].start + members[-1].length if members else 0
            members += self._members(some, tokens, made, len(next(iter(parts[-1].values()))), at)
        return members, joined_features(parts)

    def row_bytes(self, items: Sequence[Item], tokens: Sequence[int]) -> tuple[int, float]:
        """Returns the bytes that one recorded token of the first medium takes, and the seconds that its tower runs.

        Raises:
            ValueError: As ``make``.
            MediaRefused: As ``make``.
        """
        made, _ = self.collate.processed(items[:1])
        for _ in range(2):
            # The first run of a tower also makes its kernels.
            began = time.perf_counter()
            found = self._run(made, tokens[0] * self.collate.rows_per_token(self.kind))
            seconds = time.perf_counter() - began
        size = sum(tensor.numel() * tensor.element_size() for tensor in found.values())
        return -(-size // tokens[0]), seconds

    def _members(
        self, items: Sequence[Item], tokens: Sequence[int], made: Mapping[str, torch.Tensor], rows: int, at: int
    ) -> list[Member]:
        """Returns where some media stand in their shard: each has its share of the rows, by its tokens."""
        grids = made["image_grid_thw"].tolist() if "image_grid_thw" in made else [()] * len(items)
        mask = made.get("feature_attention_mask")
        frames = [0] * len(items) if mask is None else mask.sum(-1).tolist()
        members = []
        for item, count, grid, heard in zip(items, tokens, grids, frames, strict=True):
            length, rest = divmod(count * rows, sum(tokens))
            if rest:
                raise ValueError(f"{rows} units of the projector stand for {sum(tokens)} tokens")
            stand = stand_of(item, self.root)
            members.append(Member(item_name(item), *stand, at, length, count, tuple(grid), heard))
            at += length
        return members

    def _run(self, made: Mapping[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
        training = self.model.training
        self.model.eval()
        try:
            with self.autocast():
                tensors = {name: value.to(self.device) for name, value in made.items()}
                found = encoder_outputs(self.model, self.kind, tensors, rows, before_projector=self.before_projector)
        finally:
            self.model.train(training)
        return {name: self._as_kept(value).cpu() for name, value in found.items()}

    def _as_kept(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.dtype or value.dtype) if value.is_floating_point() else value


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
    """The shards of some media.

    Attributes:
        media: What they hold.
        folder: Where they stand.
        source: What makes the features.
        row_bytes: Bytes of one media token's features.
        root: Folder of the media.
        shard_bytes: Most bytes of a shard; None for the usual size.
    """

    media: DistinctMedia
    folder: Path
    source: str
    row_bytes: float
    root: Path
    shard_bytes: int | None = None

    def size_bytes(self, numbers: Iterable[int] | None = None) -> int:
        """Returns what some shards, or all of them, take on the disk, their headers apart."""
        shards = self._shards
        wanted = range(len(shards)) if numbers is None else numbers
        return round(sum(self.media.tokens[at] for number in wanted for at in shards[number]) * self.row_bytes)

    def missing(self) -> dict[int, range]:
        """Returns the numbers and items of the shards that are absent, damaged or no longer true."""
        return {number: own for number, own in enumerate(self._shards) if not self._stands(number, own)}

    def _stands(self, number: int, own: range) -> bool:
        path, items = shard_path(self.folder, number), [self.media.items[index] for index in own]
        return is_fresh(read_members(path, self.source), items, self.root) and is_whole(path)

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
        items, tokens = self.media.items, self.media.tokens
        members, tensors = make([items[at] for at in own], [tokens[at] for at in own])
        write_shard(shard_path(self.folder, number), self.source, members, tensors)

    def features(self, read: Callable[[Any, slice], dict[str, torch.Tensor]] = read_rows) -> Features:
        """Returns the features of all media; ``read`` as in ``Features``."""
        return Features(self._paths, self.source, read)

    def remove_others(self) -> None:
        """Deletes shards beyond those of the media, and what a killed run left half-written."""
        known = set(self._paths)
        for file in {*self.folder.glob("shard-*"), *self.folder.glob(".shard-*")} - known:
            file.unlink(missing_ok=True)

    def prove(self, difference: float) -> None:
        """Writes beside the shards that training on them was found to be training on the media.

        Args:
            difference: Relative difference of the loss of a batch.
        """
        shards = {path.name: _stamp(path) for path in self._paths}
        found = {"source": self.source, "row_bytes": self.row_bytes, "difference": difference, "shards": shards}
        write_json(self.folder / _PROOF, found)

    @property
    def _paths(self) -> list[Path]:
        return [shard_path(self.folder, number) for number in range(len(self._shards))]

    @property
    def _shards(self) -> list[range]:
        return cut(self.media.tokens, self.row_bytes, self.shard_bytes)


def proved(folder: Path, source: str) -> tuple[int, float] | None:
    """Returns the bytes of a token and the difference that ``Shelf.prove`` wrote, where its shards are as they were.

    Args:
        folder: Where shards stand.
        source: What would make them.
    """
    try:
        found = json.loads((folder / _PROOF).read_text("utf-8"))
        same = all(_stamp(folder / name) == stamp for name, stamp in found["shards"].items())
        return (int(found["row_bytes"]), float(found["difference"])) if same and found["source"] == source else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        # Absent, or no proof.
        return None


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def batch_loss(model: Any, batching: Batching, kind: str, accelerator: Any) -> float:
    """Returns the loss of the first micro batch with media of a kind, the model in evaluation mode."""
    batches = batching.plan.run_batches(0)
    units = next((own for own in batches if _MODALITIES[kind] & batching.batches.modalities(own)), batches[0])
    training = model.training
    model.eval()
    try:
        with without_gradients(model), accelerator.autocast():
            batch = {name: value.to(accelerator.device) for name, value in batching.batches.batch(units).items()}
            return float(batching.loss(model, batch)[0])
    finally:
        model.train(training)
