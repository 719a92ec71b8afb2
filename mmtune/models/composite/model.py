"""The composite model: towers and projectors that feed a language model, under one head.

It is called, saved, loaded and asked to generate like transformers' own multimodal models.

Shapes: B rows, T tokens, N media, H model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import slice_logits_to_keep

import mmtune.models.encoders  # noqa: F401  (its encoders become known to AutoModel)
from mmtune.models.composite.config import CompositeConfig
from mmtune.models.composite.encoders import build_encoder
from mmtune.models.composite.features import (
    patch_features,
    projected_sounds,
    projector_of,
    resamples,
    sound_features,
)


@dataclass
class CompositeOutput(ModelOutput):
    """What a forward pass gives; see transformers' ``CausalLMOutputWithPast``."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None


class CompositePreTrainedModel(PreTrainedModel):
    """What both composite classes share."""

    config_class = CompositeConfig
    base_model_prefix = "model"
    input_modalities: Any = ("image", "audio", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement: Any = ("past_key_values",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class CompositeModel(CompositePreTrainedModel):
    """Towers, projectors and the language model without its head."""

    def __init__(self, config: CompositeConfig) -> None:
        super().__init__(config)
        if config.vision_config is not None:
            self.vision_tower = build_encoder(config.vision_config)
            self.multi_modal_projector = projector_of(config, "image")
        if config.audio_config is not None:
            self.audio_tower = build_encoder(config.audio_config)
            self.audio_projector = projector_of(config, "audio")
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Returns ``pooler_output``: one ``(tokens, H)`` per image.

        Args:
            pixel_values: ``(N, channels, height, width)``.
            kwargs: Of transformers' own calls; unused.
        """
        features = patch_features(self.config, self.vision_tower, pixel_values)
        made: Any = list(self.multi_modal_projector(features))
        return BaseModelOutputWithPooling(pooler_output=made)

    def get_audio_features(
        self, input_features: torch.Tensor, feature_attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Returns ``pooler_output``: one ``(tokens, H)`` per sound.

        Args:
            input_features: Log-mel frames or samples of N sounds.
            feature_attention_mask: 1 at a sound's own frames or samples.
            kwargs: Of transformers' own calls; unused.
        """
        found, counts = sound_features(self.config, self.audio_tower, input_features, feature_attention_mask)
        fixed = resamples(self.config.projectors["audio"]["kind"])
        made: Any = projected_sounds(self.audio_projector, found, counts, fixed)
        return BaseModelOutputWithPooling(pooler_output=made)

    def media_features(
        self,
        pixel_values: torch.Tensor | None,
        input_features: torch.Tensor | None,
        feature_attention_mask: torch.Tensor | None,
        given: dict[str, BaseModelOutputWithPooling] | None,
    ) -> dict[str, torch.Tensor]:
        """Returns the features by modality, ``(tokens, H)`` each, all media one after the other.

        Raises:
            ValueError: Pixels were given, and features in place of them.
        """
        found: dict[str, Any] = {name: made.pooler_output for name, made in (given or {}).items() if made is not None}
        if pixel_values is not None and "image" in found:
            raise ValueError("both pixel_values and the image's mm_encoder_outputs were given; give one of them")
        if pixel_values is not None:
            found["image"] = self.get_image_features(pixel_values).pooler_output
        if input_features is not None:
            found["audio"] = self.get_audio_features(input_features, feature_attention_mask).pooler_output
        return {name: torch.cat(list(parts)) for name, parts in found.items()}

    def placeholders(self, modality: str, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Returns ``(B, T)`` where the tokens of a modality stand; read from the embeddings where there are no ids."""
        token = getattr(self.config, f"{modality}_token_id")
        if input_ids is not None:
            return input_ids == token
        own = self.get_input_embeddings()(torch.tensor(token, device=inputs_embeds.device))
        return (inputs_embeds == own).all(-1)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        feature_attention_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> CompositeOutput:
        """Returns the language model's hidden states ``(B, T, H)`` over text and media.

        Args:
            input_ids: ``(B, T)``, media as runs of their placeholder tokens.
            pixel_values: All images, in the order of their placeholders.
            input_features: All sounds, in the order of their placeholders.
            feature_attention_mask: See ``get_audio_features``.
            attention_mask: ``(B, T)`` padding, or a prepared ``(B, 1, T, T)``.
            position_ids: ``(B, T)``.
            past_key_values: Keys and values of earlier tokens.
            inputs_embeds: ``(B, T, H)`` in place of ids.
            mm_encoder_outputs: What ``get_image_features`` made, by modality, in place of pixels.
            kwargs: For the language model.

        Raises:
            ValueError: The features are more or fewer than the placeholders.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        features = self.media_features(pixel_values, input_features, feature_attention_mask, mm_encoder_outputs)
        text_embeds = inputs_embeds
        for modality, found in features.items():
            places_BT = self.placeholders(modality, input_ids, text_embeds)
            if int(places_BT.sum()) != len(found):
                raise ValueError(f"{int(places_BT.sum())} {modality} tokens and {len(found)} {modality} features")
            inputs_embeds = inputs_embeds.masked_scatter(places_BT[..., None], found.to(inputs_embeds))
        made = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **{**kwargs, "return_dict": True},
        )
        return CompositeOutput(
            last_hidden_state=made.last_hidden_state,
            past_key_values=made.past_key_values,
            hidden_states=made.hidden_states,
            attentions=made.attentions,
        )


class CompositeForConditionalGeneration(CompositePreTrainedModel, GenerationMixin):
    """The composite model with its language model head."""

    def __init__(self, config: CompositeConfig) -> None:
        super().__init__(config)
        self.model = CompositeModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        own = self.model.get_input_embeddings().weight
        names = (name for name, parameter in self.model.named_parameters() if parameter is own)
        self._tied_weights_keys = {"lm_head.weight": f"model.{next(names)}"}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Returns the head."""
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Returns what ``CompositeModel.get_image_features`` does."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_audio_features(
        self, input_features: torch.Tensor, feature_attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Returns what ``CompositeModel.get_audio_features`` does."""
        return self.model.get_audio_features(input_features, feature_attention_mask, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        feature_attention_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> CompositeOutput:
        """Returns ``logits`` ``(B, T, V)``, and the mean ``loss`` where ``labels`` are given.

        Args: See ``CompositeModel.forward``; ``labels`` is ``(B, T)`` with -100 where there is no loss,
            ``logits_to_keep`` the last places, or the places, that logits are made for.
        """
        made = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            input_features=input_features,
            feature_attention_mask=feature_attention_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        made.logits = self.lm_head(slice_logits_to_keep(made.last_hidden_state, logits_to_keep))
        if labels is not None:
            made.loss = self.loss_function(
                logits=made.logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return made
