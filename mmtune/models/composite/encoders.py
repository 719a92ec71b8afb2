"""Any AutoModel encoder as the tower of one modality.

Shapes: N media, F tokens of an encoder, D its width; C, Y, X channels and places of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

# Tokens that stand before the patches, by model type; others have none.
_LEADING = {"clip_vision_model": 1, "vit": 1, "dinov2": 1, "deit": 2}


def build_encoder(config: Any) -> nn.Module:
    """Returns an encoder with fresh weights; of an encoder-decoder model, its encoder."""
    from transformers import AutoModel

    model = AutoModel.from_config(config)
    return model.get_encoder() if config.is_encoder_decoder else model


def encoder_width(config: Any) -> int:
    """Returns D, of convolutions the channels of their last map; 0 where the config names none."""
    maps = getattr(config, "hidden_sizes", None) or [0]
    return int(getattr(config, "hidden_size", None) or getattr(config, "d_model", None) or maps[-1])


def has_stages(config: Any) -> bool:
    """Says whether an encoder's layers are stages of several widths (ResNet, ConvNeXt, Swin): only the last is read."""
    return bool(getattr(config, "depths", None))


def leading_tokens(config: Any) -> int:
    """Returns how many tokens stand before an image's patches (class, registers)."""
    registers = getattr(config, "num_register_tokens", 0)
    return _LEADING.get(config.model_type, 1 if registers else 0) + registers


def hidden_states(encoder: nn.Module, layer: int | None, inputs: torch.Tensor, **options: Any) -> torch.Tensor:
    """Returns ``(N, F, D)`` hidden states of an encoder.

    Args:
        encoder: The encoder.
        layer: Index into its hidden states, the embeddings first; None for the last, normed ones.
        inputs: Pixels, log-mel frames or samples.
        options: Passed on to the encoder.
    """
    if layer is None:
        found: torch.Tensor = encoder(inputs, return_dict=True, **options).last_hidden_state
        # A map (N, C, Y, X) has a token per place.
        return found.flatten(2).transpose(1, 2) if found.ndim == 4 else found
    # transformers captures only what is asked for by index; older encoders give all of them.
    made = encoder(inputs, return_dict=True, output_hidden_states=layer, **options)
    picked: torch.Tensor = made.hidden_states[layer]
    return picked


def convolved(frames: int, convolutions: Sequence[Sequence[int]]) -> int:
    """Returns how many tokens convolutions of ``(kernel, stride, padding)`` leave of some frames."""
    for kernel, stride, padding in convolutions:
        frames = (frames + 2 * padding - kernel) // stride + 1
    return max(frames, 0)


def convolutions_of(config: Any) -> list[list[int]] | None:
    """Returns the convolutions of a sound encoder; None for one whose number of tokens is fixed."""
    if hasattr(config, "conv_kernel"):
        return [[kernel, stride, 0] for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True)]
    if config.model_type == "mmtune_log_mel":
        return [[3, 2, 1], [3, 2, 1]]
    if hasattr(config, "max_source_positions"):
        return [[3, 1, 1], [3, 2, 1]]
    return None


def hears_samples(config: Any) -> bool:
    """Says whether a sound encoder reads samples, whose features would change with the padding behind them."""
    return hasattr(config, "conv_kernel")
