"""Layers of a vision tower whose output nothing reads.

LLaVA and its kin take the features of a chosen layer (``vision_feature_layer``, often the last but one); the
layers after it are computed for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mmtune.models.towers import tower_of


def skip_unused_layers(model: Any) -> int:
    """Lets the layers of the vision tower after the last one that is read hand on what they get, in place.

    The features of images stay what they are, to the last bit.

    Args:
        model: A transformers model, bare or with adapters.

    Returns:
        How many layers are skipped; 0 in a family that reads its tower's end.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    wanted = getattr(base.config, "vision_feature_layer", None)
    stacks = [
        module
        for name, module in base.named_modules()
        if tower_of(name) == "vision" and name.endswith("encoder.layers") and isinstance(module, nn.ModuleList)
    ]
    if wanted is None or len(stacks) != 1:
        return 0
    layers = stacks[0]
    # A tower's hidden states are what enters the first layer and what leaves each.
    states = len(layers) + 1
    read = max(index % states for index in ([wanted] if isinstance(wanted, int) else wanted))
    unused = layers[read:]
    for layer in unused:
        layer.forward = _hand_on
    return len(unused)


def _hand_on(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden_states
