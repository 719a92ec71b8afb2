"""Who sees whom in a row of packed trees, as the mask that the model's attention takes.

A token sees its own path, which is its branch and its tree's prefix: never a sibling branch,
never another tree. The family's own pattern stays and is measured in places along the path:
a sliding window, and images whose tokens see each other both ways. Written as one function
of index tensors, it makes the dense 4-D mask of SDPA and eager attention. The ``BlockMask``
of FlexAttention says the same in spans (``tree_blocks``); transformers takes both as they are.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mmtune.models.attention import FLEX
from mmtune.models.mask_rules import MaskRules, in_form
from mmtune.models.segments import with_pieces
from mmtune.training.tree_blocks import block_mask
from mmtune.training.tree_pieces import pieces_of

Index = torch.Tensor
Sees = Callable[[Index, Index, Index, Index], torch.Tensor]
Mask = Any  # torch.Tensor | BlockMask, or a dict of them by layer type

_VIRTUAL = -2
_QUERIES = 1024


def sees(layout: torch.Tensor, window: int | None) -> Sees:
    """Returns ``(b, h, q, k) -> bool``: whether token q of row b sees token k.

    Args:
        layout: ``(4, B, T)`` tree, branch, place along the path, and image block (-1 for none);
            the tree of padding is -1, of virtual tokens -2, which all others see.
        window: Width of the sliding window, or None.
    """
    tree, branch, place, block = layout

    def rule(b: Index, h: Index, q: Index, k: Index) -> torch.Tensor:
        own = (tree[b, q] == tree[b, k]) & ((branch[b, k] == 0) | (branch[b, k] == branch[b, q]))
        on_path = own | (tree[b, k] == _VIRTUAL)
        before = place[b, k] <= place[b, q]
        same_image = (block[b, q] >= 0) & (block[b, q] == block[b, k])
        seen = on_path & (before | same_image)
        return seen if window is None else seen & (place[b, k] > place[b, q] - window)

    return rule


def dense_mask(layout: torch.Tensor, window: int | None) -> torch.Tensor:
    """Returns the ``(B, 1, T, T)`` bool mask, True where a token is seen."""
    _, rows, length = layout.shape
    at = torch.arange(length, device=layout.device)
    row = torch.arange(rows, device=layout.device).view(-1, 1, 1, 1)
    rule, key = sees(layout, window), at.view(1, 1, 1, -1)
    seen = torch.empty(rows, 1, length, length, dtype=torch.bool, device=layout.device)
    # In pieces, as the rule takes several times the memory of what it says.
    for first in range(0, length, _QUERIES):
        query = at[first : first + _QUERIES].view(1, 1, -1, 1)
        seen[:, :, first : first + _QUERIES] = rule(row, row.new_zeros(()), query, key)
    return seen


def behind_virtual_tokens(layout: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the ``(4, B, V + T)`` layout of rows behind V virtual tokens."""
    virtual = layout.new_zeros(4, layout.shape[1], count)
    virtual[0], virtual[3] = _VIRTUAL, -1
    virtual[2] = torch.arange(count, device=layout.device)
    shifted = layout.clone()
    shifted[2] += count
    return torch.cat((virtual, shifted), dim=2)


def attention_mask(batch: Mapping[str, torch.Tensor], rules: MaskRules, *, first: int = 0) -> Mask:
    """Returns what the model takes as ``attention_mask``: one mask, or one per layer type.

    Args:
        batch: ``layout`` ``(4, B, T)`` as for ``sees``, on the model's device; for FlexAttention
            ``spans`` and ``tiles`` as ``tree_blocks.flex_parts`` makes them for the rules' windows.
        rules: Of the model.
        first: The first token that asks; those before it are keys and values alone.
    """
    masks: dict[str, Mask]
    layout = batch["layout"]
    if rules.implementation == FLEX:
        parts = zip(rules.windows, batch["spans"], batch["tiles"], strict=True)
        masks = {kind: block_mask(spans, tiles) for kind, spans, tiles in parts}
    else:
        masks = {
            kind: in_form(dense_mask(layout, window), rules)[:, :, first:] for kind, window in rules.windows.items()
        }
    if rules.implementation == "sdpa" and layout.device.type == "cpu" and (pieces := pieces_of(layout.numpy())):
        masks = {kind: with_pieces(mask, pieces, causal=rules.windows[kind] is None) for kind, mask in masks.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))
