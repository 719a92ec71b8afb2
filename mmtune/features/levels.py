"""Processed images in a quarter of their bytes, exactly.

A processor makes ``(value / 255 - mean) / std`` of the 256 values that a channel of a picture can
have, so at most 256 different floats stand in each channel. They are kept once, with a byte per
pixel that says which. What has more values is kept as it is.

Shapes: N rows of an image (patches, tiles or the image itself), C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_CHANNELS = 3
_MOST = 256
_SUFFIX = ".levels"


@dataclass(frozen=True, slots=True)
class Coded:
    """A tensor of float32 as codes.

    Attributes:
        codes: uint8, of the tensor's shape; channels come right after the rows.
        levels: Per channel, its distinct values in order.
    """

    codes: np.ndarray
    levels: tuple[np.ndarray, ...]


def coded(values: torch.Tensor) -> Coded | torch.Tensor:
    """Returns the codes of ``(N, C...)`` values, or the values themselves where they are too many or no float32."""
    if values.dtype != torch.float32 or values.dim() < 2 or values[0].numel() % _CHANNELS:
        return values
    flat = values.contiguous().numpy().reshape(len(values), _CHANNELS, -1)
    levels = tuple(np.unique(flat[:, channel]) for channel in range(_CHANNELS))
    if max(map(len, levels)) > _MOST:
        return values
    codes = np.stack([np.searchsorted(own, flat[:, at]) for at, own in enumerate(levels)], axis=1).astype(np.uint8)
    found = Coded(codes.reshape(values.shape), levels)
    # Not a number is the one value that equals none of its levels.
    return found if torch.equal(decoded(found.codes, levels), values) else values


def decoded(codes: np.ndarray, levels: Sequence[np.ndarray]) -> torch.Tensor:
    """Returns the float32 values of codes, in their shape."""
    flat = codes.reshape(len(codes), _CHANNELS, -1)
    values = np.empty(flat.shape, np.float32)
    for channel, own in enumerate(levels):
        np.take(own, flat[:, channel], out=values[:, channel], mode="clip")
    return torch.from_numpy(values.reshape(codes.shape))


def to_tensors(name: str, parts: Sequence[Coded | torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns what a shard holds of one tensor of many images: ``(sum of N, ...)``, with ``(C, 256)`` levels."""
    own = [part for part in parts if isinstance(part, Coded)]
    if len(own) == len(parts):
        shared = [np.unique(np.concatenate([part.levels[at] for part in own])) for at in range(_CHANNELS)]
        if max(map(len, shared)) <= _MOST:
            table = np.zeros((_CHANNELS, _MOST), np.float32)
            for channel, levels in enumerate(shared):
                table[channel, : len(levels)] = levels
            codes = np.concatenate([_moved(part, shared) for part in own])
            return {name: torch.from_numpy(codes), name + _SUFFIX: torch.from_numpy(table)}
    return {name: torch.cat([decoded(part.codes, part.levels) if isinstance(part, Coded) else part for part in parts])}


def _moved(part: Coded, shared: Sequence[np.ndarray]) -> np.ndarray:
    """Returns a part's codes among the levels of all parts."""
    flat = part.codes.reshape(len(part.codes), _CHANNELS, -1)
    moved = np.empty_like(flat)
    for channel, (own, all_levels) in enumerate(zip(part.levels, shared, strict=True)):
        moved[:, channel] = np.searchsorted(all_levels, own).astype(np.uint8)[flat[:, channel]]
    return moved.reshape(part.codes.shape)


def is_levels(name: str) -> bool:
    """Says whether a tensor of a shard holds levels, not rows of images."""
    return name.endswith(_SUFFIX)


def read_values(file: Any, rows: slice) -> dict[str, torch.Tensor]:
    """Returns some rows of every tensor of a shard, codes as the values they stand for.

    Args:
        file: A shard, opened by ``safe_open``.
        rows: Which.
    """
    names = set(file.keys())
    found = {}
    for name in sorted(name for name in names if not is_levels(name)):
        part = file.get_slice(name)[rows]
        levels = name + _SUFFIX
        found[name] = decoded(part.numpy(), file.get_tensor(levels).numpy()) if levels in names else part
    return found
