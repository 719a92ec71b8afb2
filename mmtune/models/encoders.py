"""Small encoders built from a config: image patches, log-mel sounds, histories of items.

They are transformers' models: known to AutoConfig and AutoModel once this module is imported, saved and loaded like
any other, and they return ``last_hidden_state`` and ``pooler_output`` (the mean of the tokens that are there).

Shapes: B batch, C channels, M mel bands, F frames, T items, N tokens, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmtune.models.inputs import FIRST_ITEM, UNKNOWN_ITEM
from mmtune.models.log_mel import LogMelFeatureExtractor


class PatchesConfig(PreTrainedConfig):
    """Config of ``PatchesModel``; names as in transformers' vision models."""

    model_type = "mmtune_patches"

    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 256
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    image_size: int = 32
    patch_size: int = 8
    num_channels: int = 3
    image_mean: float = 0.5
    """Taken from pixels of 0 to 1. Where all pixels are far from it, all patches look alike behind the first norm."""
    image_std: float = 0.5
    """Pixels are divided by it."""

    @property
    def num_tokens(self) -> int:
        """Tokens of every image, N."""
        return (self.image_size // self.patch_size) ** 2


class LogMelConfig(PreTrainedConfig):
    """Config of ``LogMelModel``; names as in transformers' Whisper, the sampling facts included."""

    model_type = "mmtune_log_mel"

    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 256
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    num_mel_bins: int = 80
    sampling_rate: int = 16000
    n_fft: int = 400
    hop_length: int = 160
    mel_mean: float = 0.0
    """Taken from the log-mel values, Whisper's. What all frames share drowns what tells them apart: a voice's pitch."""
    mel_std: float = 1.0
    """They are divided by it."""


class HistoryConfig(PreTrainedConfig):
    """Config of ``HistoryModel``."""

    model_type = "mmtune_history"

    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 256
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    vocab_size: int = 1000
    window: int = 20
    """Items that are told apart by their recency; older ones share the last position."""
    unknown_rate: float = 0.05
    """Chance of each item to be told as unknown while items are learned, so that what to make of one is learned too."""
    pad_token_id: int = 0


class _Block(nn.Module):
    """One pre-norm transformer layer without a direction."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        if width % self.heads:
            raise ValueError(f"hidden_size {width} is not a multiple of num_attention_heads {self.heads}")
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)

    def forward(self, hidden_BND: torch.Tensor, seen_B1NN: torch.Tensor | None) -> torch.Tensor:
        batch, tokens, width = hidden_BND.shape
        normed = self.layer_norm1(hidden_BND)
        query, key, value = (
            projected(normed).view(batch, tokens, self.heads, -1).transpose(1, 2)
            for projected in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen_B1NN)
        hidden_BND = hidden_BND + self.out_proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return hidden_BND + self.fc2(nn.functional.gelu(self.fc1(self.layer_norm2(hidden_BND))))


class _Encoder(PreTrainedModel):
    """The layers behind the embeddings, the same for every modality."""

    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draws the weights; convolutions keep the scale of what they are shown, so that places do not drown it."""
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def _encode(
        self, hidden_BND: torch.Tensor, mask_BN: torch.Tensor | None, output_hidden_states: bool
    ) -> BaseModelOutputWithPooling:
        seen = None
        if mask_BN is not None:
            # Everyone sees itself, so that a row of nothing but padding holds numbers.
            itself = torch.eye(mask_BN.shape[1], dtype=torch.bool, device=mask_BN.device)
            seen = (mask_BN.bool()[:, None, :] | itself)[:, None]
        states = [hidden_BND]
        for layer in self.layers:
            states.append(layer(states[-1], seen))
        last = self.layernorm(states[-1])
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=masked_mean(last, mask_BN),
            hidden_states=tuple(states) if output_hidden_states else None,
        )


class PatchesModel(_Encoder):
    """A vision transformer over square patches, each with a learned place (Dosovitskiy et al., arXiv:2010.11929)."""

    config_class = PatchesConfig
    main_input_name = "pixel_values"
    input_modalities = "image"

    def __init__(self, config: PatchesConfig) -> None:
        super().__init__(config)
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(config.num_tokens, config.hidden_size)
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool = False, **unused: Any
    ) -> BaseModelOutputWithPooling:
        """Returns the patches' features ``(B, N, D)`` of square images ``(B, C, H, W)``."""
        side = self.config.image_size
        if pixel_values.shape[-2:] != (side, side):
            raise ValueError(f"images of {tuple(pixel_values.shape[-2:])} pixels were given, {side} are expected")
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        hidden = patches.flatten(2).transpose(1, 2) + self.position_embedding.weight
        return self._encode(hidden, None, output_hidden_states)


class LogMelModel(_Encoder):
    """A speech encoder in Whisper's shape for sounds of any length: two convolutions that halve, then layers."""

    config_class = LogMelConfig
    main_input_name = "input_features"
    input_modalities = "audio"

    def __init__(self, config: LogMelConfig) -> None:
        super().__init__(config)
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.hidden_size, 3, stride=2, padding=1)
        self.conv2 = nn.Conv1d(config.hidden_size, config.hidden_size, 3, stride=2, padding=1)
        self.post_init()

    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        **unused: Any,
    ) -> BaseModelOutputWithPooling:
        """Returns the features ``(B, N, D)`` of log-mel pictures ``(B, M, F)``, zero behind a sound's end.

        Args:
            input_features: From ``LogMelFeatureExtractor``.
            attention_mask: ``(B, F)``, 1 for the frames of a sound.
            output_hidden_states: Also return the states between the layers.
            **unused: What other speech encoders take.
        """
        frames = input_features.shape[-1]
        mask = attention_mask if attention_mask is not None else input_features.new_ones(len(input_features), frames)
        lengths = mask.sum(-1).long()
        hidden = input_features.to(self.conv1.weight.dtype)
        for conv in (self.conv1, self.conv2):
            # What stands behind a sound's end must be silence to the next convolution too.
            hidden = nn.functional.gelu(conv(hidden))
            lengths = (lengths + 1) // 2
            hidden = hidden * frame_mask(lengths, hidden.shape[-1])[:, None].to(hidden.dtype)
        hidden = hidden.transpose(1, 2)
        inside = frame_mask(lengths, hidden.shape[1])
        made = self._encode(hidden + sinusoids(*hidden.shape[1:]).to(hidden), inside, output_hidden_states)
        assert made.last_hidden_state is not None
        made.last_hidden_state = made.last_hidden_state * inside[..., None].to(hidden.dtype)
        return made

    def feature_mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """Returns which tokens ``(B, N)`` belong to a sound, given its frames ``(B, F)``."""
        return frame_mask(token_length(attention_mask.sum(-1).long()), token_length(attention_mask.shape[-1]))


class HistoryModel(_Encoder):
    """What a user did, as items with recency positions: 0 is the newest item, wherever the padding stands.

    An item that it does not know says nothing at first but that it was there.
    """

    config_class = HistoryConfig
    main_input_name = "input_ids"

    def __init__(self, config: HistoryConfig) -> None:
        super().__init__(config)
        self.item_embedding = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.recency_embedding = nn.Embedding(config.window, config.hidden_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.item_embedding:
            init.zeros_(module.weight[UNKNOWN_ITEM])

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        **unused: Any,
    ) -> BaseModelOutputWithPooling:
        """Returns the features ``(B, T, D)`` of item ids ``(B, T)``, oldest first."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        recency = mask.flip(-1).cumsum(-1).flip(-1) - 1
        if self.training and self.config.unknown_rate and self.item_embedding.weight.requires_grad:
            # Drawn on the CPU, so that every device draws the same.
            gone = torch.rand(input_ids.shape).to(input_ids.device) < self.config.unknown_rate
            input_ids = input_ids.masked_fill(gone & (input_ids >= FIRST_ITEM), UNKNOWN_ITEM)
        hidden = self.item_embedding(input_ids) + self.recency_embedding(recency.clamp(0, self.config.window - 1))
        return self._encode(hidden, mask, output_hidden_states)


def masked_mean(hidden_BND: torch.Tensor, mask_BN: torch.Tensor | None) -> torch.Tensor:
    """Returns the mean ``(B, D)`` of the tokens that are there; zeros where there is none."""
    if mask_BN is None:
        return hidden_BND.mean(1)
    weights = mask_BN.to(hidden_BND.dtype)[..., None]
    return (hidden_BND * weights).sum(1) / weights.sum(1).clamp(min=1)


def token_length(frames: Any) -> Any:
    """Returns the tokens that two halving convolutions make of so many frames (numbers or tensors)."""
    return ((frames + 1) // 2 + 1) // 2


def frame_mask(lengths_B: torch.Tensor, longest: int) -> torch.Tensor:
    """Returns ``(B, longest)``, true inside each length."""
    return torch.arange(longest, device=lengths_B.device) < lengths_B[:, None]


def sinusoids(tokens: int, width: int) -> torch.Tensor:
    """Returns Whisper's fixed positions ``(tokens, width)``: sines and cosines of 1 to 10,000 tokens."""
    scale = torch.exp(-math.log(10000) / (width // 2 - 1) * torch.arange(width // 2))
    angles = torch.arange(tokens)[:, None] * scale
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _register() -> None:
    for config, model in ((PatchesConfig, PatchesModel), (LogMelConfig, LogMelModel), (HistoryConfig, HistoryModel)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
    AutoFeatureExtractor.register(LogMelConfig, LogMelFeatureExtractor, exist_ok=True)


_register()
