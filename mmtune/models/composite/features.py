"""What the towers and projectors make of media: one row per token that stands for it.

Shapes: N media, F tokens of an encoder, D its width, M tokens of a medium, H model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmtune.models.composite.config import TOWERS
from mmtune.models.composite.encoders import convolved, encoder_width, hears_samples, hidden_states, leading_tokens
from mmtune.models.fusion.projector import build_projector, projected_tokens
from mmtune.models.inputs import PADDING


@dataclass(frozen=True)
class Media:
    """The media of a call, see ``CompositeModel.forward``."""

    pixel_values: torch.Tensor | None
    frame_milliseconds: torch.Tensor | None
    input_features: torch.Tensor | None
    feature_attention_mask: torch.Tensor | None
    history_ids: torch.Tensor | None
    encoded: dict[str, BaseModelOutputWithPooling] | None


def projector_of(config: Any, modality: str) -> nn.Module:
    """Returns a fresh projector from an encoder's features to the language model's width."""
    encoder = getattr(config, f"{TOWERS[modality]}_config")
    settings = {name: value for name, value in config.projectors[modality].items() if name != "instruction"}
    return build_projector(source_width=encoder_width(encoder), width=config.text_config.hidden_size, **settings)


def resamples(kind: str) -> bool:
    """Says whether a kind of projector gives the same number of tokens for every medium."""
    return projected_tokens(kind, 0, 1) > 0


def patch_features(config: Any, tower: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Returns ``(N, F, D)`` features of images, without the tokens before the patches where the config drops them."""
    found = hidden_states(tower, config.vision_feature_layer, pixel_values)
    if config.vision_feature_select_strategy == "default":
        found = found[:, leading_tokens(config.vision_config) :]
    return found


def sound_features(
    config: Any, tower: nn.Module, inputs: torch.Tensor, mask_NF: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``(N, F, D)`` features of sounds, and ``(N,)`` how many of each are its own and not padding.

    Args:
        config: Of the composite model.
        tower: The sound encoder.
        inputs: Log-mel frames ``(N, bands, frames)`` or samples ``(N, samples)``.
        mask_NF: 1 at a sound's own frames or samples; None where there is no padding.
    """
    layer, steps = config.audio_feature_layer, config.audio_convolutions
    if hears_samples(config.audio_config):
        lengths = [inputs.shape[1]] * len(inputs) if mask_NF is None else mask_NF.sum(-1).tolist()
        alone = [hidden_states(tower, layer, one[None, :own])[0] for one, own in zip(inputs, lengths, strict=True)]
        counts = torch.tensor([len(own) for own in alone], device=inputs.device)
        return nn.utils.rnn.pad_sequence(alone, batch_first=True), counts
    options = {} if mask_NF is None or steps is None else {"attention_mask": mask_NF}
    found = hidden_states(tower, layer, inputs, **options)
    if steps is None or mask_NF is None:
        return found, torch.full((len(found),), found.shape[1], device=inputs.device)
    counts = torch.tensor([convolved(int(own), steps) for own in mask_NF.sum(-1)], device=inputs.device)
    return found, counts


def history_features(tower: nn.Module, history_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``(N, F, D)`` features of histories, and ``(N,)`` how many of each are its own and not padding.

    Args:
        tower: The encoder of item ids.
        history_ids: ``(N, F)`` oldest first, 0 behind the last.
    """
    mask_NF = (history_ids != PADDING).long()
    return hidden_states(tower, None, history_ids, attention_mask=mask_NF), mask_NF.sum(-1)


def projected_apart(
    projector: nn.Module,
    features_NFD: torch.Tensor,
    counts_N: torch.Tensor,
    fixed: bool,
    instruction_NH: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Returns one ``(M, H)`` per sound or history, what is padding left out.

    Args:
        projector: Of the modality.
        features_NFD: Features, padded.
        counts_N: How many of them are a medium's own.
        fixed: The projector gives the same number of tokens for every medium.
        instruction_NH: What each of them is asked about, for a resampler that reads it.
    """
    seen_NF = torch.arange(features_NFD.shape[1], device=counts_N.device) < counts_N[:, None]
    made = projector(features_NFD, seen_NF, instruction_NH)
    if fixed:
        return list(made)
    return [own[:count] for own, count in zip(made, counts_N.tolist(), strict=True)]
