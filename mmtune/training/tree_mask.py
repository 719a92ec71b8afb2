"""Who sees whom in a row of packed trees, as the mask that the model's attention takes.

A token sees its own path, which is its branch and its tree's prefix: never a sibling branch,
never another tree. The family's own pattern stays and is measured in places along the path:
a sliding window, and images whose tokens see each other both ways. This is the dense 4-D mask
of SDPA and eager attention. The ``BlockMask`` of FlexAttention says the same in spans
(``tree_blocks``); transformers takes both as they are.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mmtune.models.attention import FLEX
from mmtune.models.mask_rules import MaskRules, in_form
from mmtune.models.segments import with_pieces
from mmtune.training.tree_blocks import block_mask
from mmtune.training.tree_pieces import pieces_of

Mask = Any  # torch.Tensor | BlockMask, or a dict of them by layer type

_VIRTUAL = -2
_QUERIES = 1024


def dense_mask(layout: torch.Tensor, window: int | None) -> torch.Tensor:
    """Returns the ``(B, 1, T, T)`` bool mask, True where a token is seen.

    Args:
        layout: ``(4, B, T)`` tree, branch, place along the path, and image block (-1 for none);
            the tree of padding is -1, of virtual tokens -2, which all others see.
        window: Width of the sliding window, or None.
    """
    _, rows, length = layout.shape
    seen_BTT = torch.empty(rows, length, length, dtype=torch.bool, device=layout.device)
    # In pieces, as comparing takes several times the memory of what it says.
    for asking, seen in zip(layout.split(_QUERIES, 2), seen_BTT.split(_QUERIES, 1), strict=True):
        seen.copy_(_seen(asking, layout, window))
    return seen_BTT[:, None]


def _seen(asking: torch.Tensor, asked: torch.Tensor, window: int | None) -> torch.Tensor:
    """Returns ``(B, Q, T)``, which tokens some see; what no row has is not compared."""
    tree_q, branch_q, place_q, block_q = asking[..., None]
    tree_k, branch_k, place_k, block_k = asked[:, :, None]
    on_path = (branch_k == branch_q).logical_or_(branch_k == 0).logical_and_(tree_k == tree_q)
    if bool((virtual := tree_k == _VIRTUAL).any()):
        on_path |= virtual
    near = place_k <= place_q
    if bool((block_q >= 0).any()):
        near |= (block_k == block_q) & (block_q >= 0)
    if window is not None:
        near &= place_k > place_q - window
    return on_path.logical_and_(near)


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
        batch: ``layout`` ``(4, B, T)`` as for ``dense_mask``, on the model's device; for FlexAttention
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
