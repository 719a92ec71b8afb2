"""Who sees whom in a row of packed trees, as the mask that the model's attention takes.

A token sees its own path, which is its branch and its tree's prefix: never a sibling branch,
never another tree. The family's own pattern stays and is measured in places along the path:
a sliding window, and images whose tokens see each other both ways. Written as one function
of index tensors, it makes the dense 4-D mask of SDPA and eager attention and the
``BlockMask`` of FlexAttention alike; transformers takes both as they are.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mmtune.errors import CapabilityError
from mmtune.models.soft_prompt import virtual_tokens
from mmtune.models.spread import is_sharded

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Index = torch.Tensor
Sees = Callable[[Index, Index, Index, Index], torch.Tensor]
Mask = Any  # torch.Tensor | BlockMask, or a dict of them by layer type

_FULL, _SLIDING = "full_attention", "sliding_attention"
_VIRTUAL = -2
_IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")


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
    implementation = config._attn_implementation or "sdpa"
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
    if virtual_tokens(model) and (implementation == "flex_attention" or is_sharded(model)):
        what = "FlexAttention" if implementation == "flex_attention" else "shards"
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
    return sees(layout, window)(row, row.new_zeros(()), at.view(1, 1, -1, 1), at.view(1, 1, 1, -1))


def block_mask(layout: torch.Tensor, window: int | None) -> BlockMask:
    """Returns FlexAttention's mask, compiled on an accelerator."""
    from torch.nn.attention.flex_attention import create_block_mask

    _, rows, length = layout.shape
    device = layout.device
    return create_block_mask(
        sees(layout, window), rows, None, length, length, device=str(device), _compile=device.type != "cpu"
    )


def behind_virtual_tokens(layout: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the ``(4, B, V + T)`` layout of rows behind V virtual tokens."""
    virtual = layout.new_zeros(4, layout.shape[1], count)
    virtual[0], virtual[3] = _VIRTUAL, -1
    virtual[2] = torch.arange(count, device=layout.device)
    shifted = layout.clone()
    shifted[2] += count
    return torch.cat((virtual, shifted), dim=2)


def attention_mask(layout: torch.Tensor, rules: MaskRules, *, first: int = 0) -> Mask:
    """Returns what the model takes as ``attention_mask``: one mask, or one per layer type.

    Args:
        layout: ``(4, B, T)`` as for ``sees``, on the model's device.
        rules: Of the model.
        first: The first token that asks; those before it are keys and values alone.
    """
    masks = {kind: _mask(layout, window, rules) for kind, window in rules.windows.items()}
    if first:
        masks = {kind: mask[:, :, first:] for kind, mask in masks.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _mask(layout: torch.Tensor, window: int | None, rules: MaskRules) -> Mask:
    if rules.implementation == "flex_attention":
        return block_mask(layout, window)
    seen = dense_mask(layout, window)
    if rules.implementation == "sdpa" and seen.device.type != "cpu":
        return seen
    # Added to the scores; on a CPU SDPA would make this of a bool mask again in every layer, forward and backward.
    hidden = torch.finfo(rules.dtype).min
    return torch.zeros((), dtype=rules.dtype, device=seen.device).where(seen, hidden)
