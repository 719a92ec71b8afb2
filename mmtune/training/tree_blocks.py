"""Who sees whom as two spans of keys per token, and FlexAttention's ``BlockMask`` from them.

A token's path is its tree's prefix and its own branch, and each of the two stands in one piece.
So what it sees is ``[first, end)`` of the prefix and ``[own, last)`` of its branch. That makes
the blocks cheap to find where batches are made, without a look at T x T pairs on the GPU, and
leaves the kernel four numbers per query to load and none per key.

Shapes: B rows, T tokens, Q = T / 128 blocks of tokens, K kinds of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Tokens of a block; rows for FlexAttention are padded to a multiple of it."""
_SOME, _ALL = 1, 2


def seen_spans(layout: np.ndarray, window: int | None) -> np.ndarray:
    """Returns ``(4, B, T)`` int32: ``first, end, own, last`` of every token, a span being empty where it ends early.

    Args:
        layout: ``(4, B, T)`` as for ``tree_mask.dense_mask``, without virtual tokens.
        window: Width of the sliding window, or None.
    """
    tree, branch, place, image = layout
    at = np.broadcast_to(np.arange(tree.shape[1]), tree.shape)
    new_tree = np.diff(tree, axis=1, prepend=-2) != 0
    new_piece = new_tree | (np.diff(branch, axis=1, prepend=-1) != 0)
    start, own = _latest(at, new_tree), _latest(at, new_piece)
    # Places along the path: a branch goes on where its prefix ends; padding has none and is one piece.
    begins = np.take_along_axis(place, own, axis=1)
    oldest = np.zeros_like(at) if window is None else place - window + 1
    end = np.where(branch > 0, start + begins, start)
    own = own + np.maximum(oldest - begins, 0)
    last = np.where(tree < 0, at.shape[1], at + 1)
    last = np.where(image >= 0, _ends(image, new_piece), last)
    return np.stack([start + np.maximum(oldest, 0), end, own, last]).astype(np.int32)


def _latest(at: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Returns per token the last place at or before it where something begins."""
    return np.maximum.accumulate(np.where(begins, at, 0), axis=1)


def _ends(image: np.ndarray, new_piece: np.ndarray) -> np.ndarray:
    """Returns per token where its image ends within its piece of the path."""
    length = image.shape[1]
    begins = new_piece | (np.diff(image, axis=1, prepend=-2) != 0)
    after = np.pad(begins[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    back = np.where(after, np.arange(1, length + 1), length)[:, ::-1]
    return np.minimum.accumulate(back, axis=1)[:, ::-1]


def block_tiles(spans: np.ndarray) -> np.ndarray:
    """Returns ``(B, Q, Q)`` int8 of ``seen_spans``: whether a block sees none (0), some (1) or all (2) of another."""
    _, rows, length = spans.shape
    starts = np.arange(0, length, BLOCK, dtype=np.int32)
    seen = np.zeros((rows, length, starts.size), dtype=np.int32)
    for first, end in (spans[:2], spans[2:]):
        inside = np.minimum(end[..., None], starts + BLOCK) - np.maximum(first[..., None], starts)
        seen += np.maximum(inside, 0)
    pairs = seen.reshape(rows, -1, BLOCK, starts.size).sum(axis=2)
    return np.where(pairs == BLOCK * BLOCK, _ALL, np.where(pairs > 0, _SOME, 0)).astype(np.int8)


def flex_parts(layout: np.ndarray, windows: Sequence[int | None]) -> dict[str, torch.Tensor]:
    """Returns what a batch carries for ``block_mask``: ``spans`` ``(K, 4, B, T)`` and ``tiles`` ``(K, B, Q, Q)``.

    Args:
        layout: ``(4, B, T)``, T a multiple of ``BLOCK``.
        windows: Of every kind of layer.
    """
    spans = [seen_spans(layout, window) for window in windows]
    tiles = [block_tiles(own) for own in spans]
    return {"spans": torch.from_numpy(np.stack(spans)), "tiles": torch.from_numpy(np.stack(tiles))}


def sees_spans(spans: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Returns ``(b, h, q, k) -> bool``: whether token q of row b sees token k, by ``seen_spans``."""
    first, end, own, last = spans

    def rule(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return ((k >= first[b, q]) & (k < end[b, q])) | ((k >= own[b, q]) & (k < last[b, q]))

    return rule


def block_mask(spans: torch.Tensor, tiles: torch.Tensor) -> BlockMask:
    """Returns FlexAttention's mask, the same for all heads and all layers of a kind.

    Args:
        spans: ``(4, B, T)`` int32 on the model's device.
        tiles: ``(B, Q, Q)`` int8 there.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = spans.shape[2]
    return BlockMask.from_kv_blocks(
        *_in_order(tiles == _SOME),
        *_in_order(tiles == _ALL),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees_spans(spans),
        seq_lengths=(length, length),
    )


def _in_order(wanted_BQQ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``(B, 1, Q)`` how many blocks each block wants, and ``(B, 1, Q, Q)`` those first, in order."""
    counts = wanted_BQQ.sum(dim=-1, dtype=torch.int32)
    order = torch.argsort(wanted_BQQ.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[:, None].contiguous(), order[:, None].contiguous()
