"""Images as the processor makes them, on disk: no large photo is decoded at every epoch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmtune.features.levels import Coded, coded, is_levels, to_tensors
from mmtune.features.shards import Item, Member, item_name, stand_of
from mmtune.training.feed import feed
from mmtune.training.frozen_features import Shelf

if TYPE_CHECKING:
    from mmtune.encoding.collate import Collator

SHARD_BYTES = 32 << 20
"""A shard is one unit of work of a process, and what a killed run loses."""


@dataclass(frozen=True)
class PixelMaker:
    """What processes images.

    Attributes:
        collate: Of the split; its family joins images.
        root: Folder of the media.
    """

    collate: Collator
    root: Path

    def make(self, items: Sequence[Item], expected: Sequence[int]) -> tuple[list[Member], dict[str, torch.Tensor]]:
        """Returns members and tensors of one shard, ``(sum of N, ...)`` with N rows per image.

        Raises:
            ValueError: An image takes another number of tokens than expected, or its tensors differ in N.
            MediaRefused: A file is gone or damaged.
        """
        members: list[Member] = []
        parts: dict[str, list[Coded | torch.Tensor]] = defaultdict(list)
        stands: dict[str, tuple[int, int, str]] = {}
        at = 0
        made = self.collate.processed_apart(items)
        for item, count, (tensors, tokens) in zip(items, expected, made, strict=True):
            if tokens != count:
                raise ValueError("an image alone takes another number of tokens than in its row")
            grid = tuple(tensors.pop("image_grid_thw").flatten().tolist()) if "image_grid_thw" in tensors else ()
            rows = {len(tensor) for tensor in tensors.values()}
            if len(rows) != 1:
                raise ValueError(f"the tensors of an image have {sorted(rows)} rows")
            path, own = item.medium.path, rows.pop()
            if path not in stands:
                stands[path] = stand_of(item, self.root)
            members.append(Member(item_name(item), *stands[path], at, own, count, grid))
            at += own
            for name, tensor in tensors.items():
                parts[name].append(coded(tensor))
        joined = [to_tensors(name, some) for name, some in parts.items()]
        return members, {name: tensor for some in joined for name, tensor in some.items()}

    def size_bytes(self, item: Item, tokens: int) -> int:
        """Returns what an image takes on disk.

        Raises:
            ValueError: As ``make``.
        """
        _, tensors = self.make([item], [tokens])
        return sum(tensor.nbytes for name, tensor in tensors.items() if not is_levels(name))


def fill(
    shelf: Shelf, maker: PixelMaker, missing: Mapping[int, range], workers: int, advance: Callable[[int], None]
) -> None:
    """Processes the images of some shards and writes them, in ``workers`` processes as ``feed`` has them.

    Raises:
        ValueError: As ``PixelMaker.make``.
        ResourceError: A process was killed.
    """

    def write(number: int) -> dict[str, torch.Tensor]:
        shelf.write(maker.make, number, missing[number])
        return {"images": torch.tensor(len(missing[number]))}

    with closing(feed(write, list(missing), min(workers, len(missing)))) as written:
        for one in written:
            advance(int(one["images"]))


def first_that_fit(tokens: Sequence[int], bytes_per_token: float, room_bytes: float) -> int:
    """Returns how many images, from the first on, take no more than ``room_bytes``."""
    held = 0
    for count, own in enumerate(tokens):
        held += own
        if held * bytes_per_token > room_bytes:
            return count
    return len(tokens)
