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
from dataclasses import dataclass
from typing import Any

import torch

from mmtune.errors import CapabilityError
from mmtune.models.attention import FLEX, text_attention
from mmtune.models.segments import with_pieces
from mmtune.models.soft_prompt import virtual_tokens
from mmtune.models.spread import is_sharded
from mmtune.training.tree_blocks import block_mask
from mmtune.training.tree_pieces import pieces_of

Index = torch.Tensor
Sees = Callable[[Index, Index, Index, Index], torch.Tensor]
Mask = Any  # torch.Tensor | BlockMask, or a dict of them by layer type

_FULL, _SLIDING = "full_attention", "sliding_attention"
_VIRTUAL = -2
_QUERIES = 1024
_IMPLEMENTATIONS = ("sdpa", "eager", FLEX)


@dataclass(frozen=True)
class MaskRules:
    """What a model's attention wants.

    Attributes:
        implementation: ``sdpa``, ``eager`` or ``flex_attention``.
        windows: Width of the sliding window by layer type, None for no window.
        dtype: Type of the model's weights, for the additive mask of eager attention.
    """

    implementation: str
    windows: Mapping[str, int | None]
    dtype: torch.dtype


def mask_rules(model: Any) -> MaskRules:
    """Returns the rules of a transformers model, bare or with adapters.

    Raises:
        CapabilityError: Its attention cannot take a mask of our own, or its layers keep a state
            that runs through the row.
    """
    config = model.config.get_text_config()
    implementation = text_attention(model)
    if implementation not in _IMPLEMENTATIONS:
        raise CapabilityError(
            f"the attention kernel {implementation} takes no mask of our own", "use model.attn: sdpa", "no_tree_mask"
        )
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or (_SLIDING if window else _FULL,))
    other = sorted(kinds - {_FULL, _SLIDING})
    if other:
        raise CapabilityError(
            f"layers of the kind {other[0]} mix tokens without an attention mask",
            "set tokenize.layout: rows",
            "no_tree_mask",
        )
    if virtual_tokens(model) and (implementation == FLEX or is_sharded(model)):
        what = "FlexAttention" if implementation == FLEX else "shards"
        raise CapabilityError(
            f"virtual tokens before a tree do not go with {what}", "set tokenize.layout: rows", "no_tree_mask"
        )
    return MaskRules(
        implementation, {kind: window if kind == _SLIDING else None for kind in sorted(kinds)}, model.dtype
    )


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
        masks = {kind: _dense(layout, window, rules)[:, :, first:] for kind, window in rules.windows.items()}
    if rules.implementation == "sdpa" and layout.device.type == "cpu" and (pieces := pieces_of(layout.numpy())):
        masks = {kind: with_pieces(mask, pieces, causal=rules.windows[kind] is None) for kind, mask in masks.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _dense(layout: torch.Tensor, window: int | None, rules: MaskRules) -> torch.Tensor:
    seen = dense_mask(layout, window)
    if rules.implementation == "sdpa" and seen.device.type != "cpu":
        return seen
    # Added to the scores; on a CPU SDPA would make this of a bool mask again in every layer, forward and backward.
    hidden = torch.finfo(rules.dtype).min
    return torch.zeros((), dtype=rules.dtype, device=seen.device).where(seen, hidden)
