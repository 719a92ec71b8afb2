"""What a model's attention wants of a mask that we make ourselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mmtune.errors import CapabilityError
from mmtune.models.attention import FLEX, text_attention
from mmtune.models.soft_prompt import virtual_tokens
from mmtune.models.spread import is_sharded

_FULL, _SLIDING = "full_attention", "sliding_attention"
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


def in_form(seen: torch.Tensor, rules: MaskRules) -> torch.Tensor:
    """Returns a dense bool mask, True where a token is seen, in the form that the attention takes."""
    if rules.implementation == "sdpa" and seen.device.type != "cpu":
        return seen
    # Added to the scores; on a CPU SDPA would make this of a bool mask again in every layer, forward and backward.
    hidden = torch.finfo(rules.dtype).min
    return torch.zeros((), dtype=rules.dtype, device=seen.device).where(seen, hidden)
