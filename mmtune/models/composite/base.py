"""What both classes of the composite model share: what they give, what they can, and how their own weights start.

Shapes: B rows, T tokens, K branches, H model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from mmtune.models.composite.config import CompositeConfig
from mmtune.models.fusion.co_attention import CoAttention
from mmtune.models.fusion.gate import DecisionGate
from mmtune.models.fusion.gated_cross import GatedCrossAttention
from mmtune.models.fusion.resampler import Perceiver, QFormer
from mmtune.models.fusion.single_stream import SegmentEmbedding

# Modules with weights of their own beside those of linear layers and norms.
_OWN_START = (CoAttention, DecisionGate, GatedCrossAttention, Perceiver, QFormer, SegmentEmbedding)


@dataclass
class CompositeOutput(ModelOutput):
    """What a forward pass gives; see transformers' ``CausalLMOutputWithPast``."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None
    log_gate: torch.Tensor | None = None
    """``(B, T, K)`` log weights of the branches, where the gate mixes any."""
    passes: Any = None
    """Which branches share a run of the language model."""
    own_answers: Any = None
    """What each branch predicts alone, where the auxiliary loss is to train it; see ``auxiliary.OwnAnswers``."""
    fusion_state: Any = None
    """What the next call needs beside ``past_key_values``."""
    media_states: torch.Tensor | None = None
    """``(B, T, H)`` the media stream behind co-attention at its tokens, of early fusion in a call without a past."""


class CompositePreTrainedModel(PreTrainedModel):
    """What both composite classes share."""

    config: CompositeConfig
    config_class = CompositeConfig
    base_model_prefix = "model"
    input_modalities: Any = ("image", "audio", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement: Any = ("past_key_values",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, _OWN_START):
            module.reset_parameters()
