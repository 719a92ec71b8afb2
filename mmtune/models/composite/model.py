"""The composite model: towers and projectors that feed a language model, under one head.

It is called, saved, loaded and asked to generate like transformers' own multimodal models.

Shapes: B rows, T tokens, N media, H model width, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep

import mmtune.models.encoders  # noqa: F401  (its encoders become known to AutoModel)
from mmtune.errors import CapabilityError
from mmtune.models.composite.auxiliary import loss_of_labels, predict
from mmtune.models.composite.base import CompositeOutput, CompositePreTrainedModel
from mmtune.models.composite.config import CompositeConfig
from mmtune.models.composite.encoders import build_encoder
from mmtune.models.composite.features import (
    Media,
    history_features,
    patch_features,
    projected_apart,
    projector_of,
    resamples,
    sound_features,
)
from mmtune.models.composite.fuse import Row, Run, asked_of_media, fuse, kinds_at, prompt_at, turns_at, without_dropped
from mmtune.models.composite.head import MixingHead, join
from mmtune.models.composite.passes import FusionState, pass_positions
from mmtune.models.composite.shared_start import run_in_two, shared_start
from mmtune.models.composite.stream import ARGUMENT, add_blocks
from mmtune.models.fusion.gate import DecisionGate
from mmtune.models.fusion.single_stream import SegmentEmbedding
from mmtune.models.fusion.time_positions import TimePositions


class CompositeModel(CompositePreTrainedModel):
    """Towers, projectors and the language model without its head."""

    def __init__(self, config: CompositeConfig) -> None:
        super().__init__(config)
        if config.vision_config is not None:
            self.vision_tower = build_encoder(config.vision_config)
            self.multi_modal_projector = projector_of(config, "image")
            if config.frame_times:
                self.multi_modal_projector.times = TimePositions(config.text_config.hidden_size)
        if config.audio_config is not None:
            self.audio_tower = build_encoder(config.audio_config)
            self.audio_projector = projector_of(config, "audio")
        if config.behaviour_config is not None:
            self.behaviour_tower = build_encoder(config.behaviour_config)
            self.behaviour_projector = projector_of(config, "behaviour")
        self.language_model = AutoModel.from_config(config.text_config)
        fusion, width = config.fusion, config.text_config.hidden_size
        if fusion["mode"] != "early" and config.modalities:
            lead = 0 if fusion["mode"] == "hybrid" else None
            self.gate = DecisionGate(len(config.branches), width if fusion["instruction"] else None, lead=lead)
        if fusion["attention"] == "self":
            self.segments = SegmentEmbedding(config.kinds, width)
        if fusion["layers"]:
            self.media_attention = add_blocks(self.language_model, config)
        self.post_init()

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        frame_milliseconds: torch.Tensor | None = None,
        instruction: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Returns ``pooler_output``: one ``(tokens, H)`` per image.

        Args:
            pixel_values: ``(N, channels, height, width)``.
            frame_milliseconds: ``(N,)`` when the frame of a video was taken, -1 for other images.
            instruction: ``(N, H)`` what each image is asked about, for a resampler that reads it.
            kwargs: Of transformers' own calls; unused.
        """
        features = patch_features(self.config, self.vision_tower, pixel_values)
        projector: Any = self.multi_modal_projector
        made: Any = projector(features, None, instruction)
        if self.config.frame_times and frame_milliseconds is not None:
            times = projector.times(frame_milliseconds / 1000.0)
            made = made + times[:, None] * (frame_milliseconds >= 0)[:, None, None]
        return BaseModelOutputWithPooling(pooler_output=list(made))  # type: ignore[arg-type]

    def get_audio_features(
        self,
        input_features: torch.Tensor,
        feature_attention_mask: torch.Tensor | None = None,
        instruction: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Returns ``pooler_output``: one ``(tokens, H)`` per sound.

        Args:
            input_features: Log-mel frames or samples of N sounds.
            feature_attention_mask: 1 at a sound's own frames or samples.
            instruction: ``(N, H)`` what each sound is asked about, for a resampler that reads it.
            kwargs: Of transformers' own calls; unused.
        """
        found, counts = sound_features(self.config, self.audio_tower, input_features, feature_attention_mask)
        fixed = resamples(self.config.projectors["audio"]["kind"])
        made: Any = projected_apart(self.audio_projector, found, counts, fixed, instruction)
        return BaseModelOutputWithPooling(pooler_output=made)

    def get_behaviour_features(
        self, history_ids: torch.Tensor, instruction: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Returns ``pooler_output``: one ``(tokens, H)`` per history.

        Args:
            history_ids: ``(N, items)`` ids of what each user chose, oldest first, 0 behind the last.
            instruction: ``(N, H)`` what each history is asked about, for a resampler that reads it.
            kwargs: Of transformers' own calls; unused.
        """
        found, counts = history_features(self.behaviour_tower, history_ids)
        fixed = resamples(self.config.projectors["behaviour"]["kind"])
        made: Any = projected_apart(self.behaviour_projector, found, counts, fixed, instruction)
        return BaseModelOutputWithPooling(pooler_output=made)

    def media_features(self, media: Media, where: dict[str, torch.Tensor], row: Row | None) -> dict[str, torch.Tensor]:
        """Returns the features by modality, ``(tokens, H)`` each, all media one after the other.

        Args:
            media: What was given.
            where: ``(B, T)`` places of the tokens, by modality.
            row: The tokens, where a resampler reads the instruction.

        Raises:
            ValueError: Pixels were given, and features in place of them; or features do not fit their placeholders.
        """
        given = {name: made.pooler_output for name, made in (media.encoded or {}).items() if made}
        if media.pixel_values is not None and "image" in given:
            raise ValueError("both pixel_values and the image's mm_encoder_outputs were given; give one of them")
        found: dict[str, Any] = {**given, **self.encode(media, where, row)}
        features = {name: torch.cat(list(parts)) for name, parts in found.items()}
        for name, own in features.items():
            if int(where[name].sum()) != len(own):
                raise ValueError(f"{int(where[name].sum())} {name} tokens and {len(own)} {name} features")
        return features

    def encode(self, media: Media, where: dict[str, torch.Tensor], row: Row | None) -> dict[str, list[torch.Tensor]]:
        """Returns what towers and projectors make of each medium, ``(tokens, H)``, by modality; arguments as above."""
        found = {}
        if media.pixel_values is not None:
            asked = self.asked(row, where["image"], "image")
            found["image"] = self.get_image_features(media.pixel_values, media.frame_milliseconds, asked)
        if media.input_features is not None:
            asked = self.asked(row, where["audio"], "audio")
            found["audio"] = self.get_audio_features(media.input_features, media.feature_attention_mask, asked)
        if media.history_ids is not None:
            asked = self.asked(row, where["behaviour"], "behaviour")
            found["behaviour"] = self.get_behaviour_features(media.history_ids, asked)
        return {name: list(made.pooler_output) for name, made in found.items()}  # type: ignore[arg-type]

    def asked(self, row: Row | None, places_BT: torch.Tensor, modality: str) -> torch.Tensor | None:
        """Returns ``(N, H)`` what each medium is asked about, where the resampler reads it."""
        if row is None or not self.config.resampler_reads(modality):
            return None
        return asked_of_media(row, places_BT, self.config.projectors[modality]["queries"])

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
        frame_milliseconds: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        feature_attention_mask: torch.Tensor | None = None,
        history_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        user_turns: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        fusion_state: FusionState | None = None,
        **kwargs: Any,
    ) -> CompositeOutput:
        """Returns the language model's hidden states over text and media.

        They are ``(B, T, H)``, or what ``MixingHead`` takes where there are several passes.

        Args:
            input_ids: ``(B, T)``, media as runs of their placeholder tokens.
            pixel_values: All images, in the order of their placeholders.
            frame_milliseconds: See ``get_image_features``.
            input_features: All sounds, in the order of their placeholders.
            feature_attention_mask: See ``get_audio_features``.
            history_ids: All histories, in the order of their placeholders; see ``get_behaviour_features``.
            attention_mask: ``(B, T)`` padding, or a prepared ``(B, 1, T, T)``.
            position_ids: ``(B, T)``.
            past_key_values: Keys and values of earlier tokens.
            inputs_embeds: ``(B, T, H)`` in place of ids.
            prompt_mask: ``(B, T)`` 1 before the first answer; None says that all is prompt.
            user_turns: ``(B, T)`` whose words are the instruction, see ``turns.UserTurns``; None takes the prompt's.
            mm_encoder_outputs: What ``get_image_features`` made, by modality, in place of pixels.
            fusion_state: The last call's, where this one goes on from it.
            kwargs: For the language model.

        Raises:
            ValueError: The features are more or fewer than the placeholders.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        words = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        where = {name: self.placeholders(name, input_ids, words) for name in self.config.modalities}
        prompt = prompt_at(prompt_mask, words)
        turns = turns_at(user_turns, prompt)
        row = Row(words, kinds_at(where, words), attention_mask, prompt, turns, fusion_state)
        if self.training and self.config.fusion["modality_dropout"]:
            row = without_dropped(self.config, row, position_ids)
        media = Media(
            pixel_values, frame_milliseconds, input_features, feature_attention_mask, history_ids, mm_encoder_outputs
        )
        features = self.media_features(media, where, row if fusion_state is None else None)
        run = fuse(self.config, row, features, where, self._learned())
        kinds, past = run.state.kinds, past_key_values
        places = pass_positions(position_ids, attention_mask, kinds, run.passes, words.shape[1], past)
        made = self._run(run, position_ids, places, past, kwargs)
        hidden, log_gate = made.last_hidden_state, run.log_gate_of_passes
        return CompositeOutput(
            last_hidden_state=hidden if log_gate is None else join(hidden, log_gate),
            past_key_values=made.past_key_values,
            hidden_states=made.hidden_states,
            attentions=made.attentions,
            log_gate=run.log_gate,
            passes=run.passes,
            fusion_state=run.finished(made.past_key_values is not None),
            media_states=run.media_states() if fusion_state is None else None,
        )

    def _learned(self) -> dict[str, nn.Module]:
        return {name: module for name in ("gate", "segments") if (module := getattr(self, name, None)) is not None}

    def _run(self, run: Run, of_rows: Any, of_passes: Any, past: Any, kwargs: dict[str, Any]) -> Any:
        """Returns what the language model makes of all passes; positions are those of the rows and of all passes."""
        passes, start = run.passes.count, 0
        if run.state.kinds.shape[1] == run.embeds.shape[1]:
            # Keys and values of virtual tokens stand once per row.
            start = self._shared_start(run, past, kwargs)
            if passes > 1 and not start and past is not None and past.get_seq_length():
                past.batch_repeat_interleave(passes)
        stream = {} if run.stream is None else {ARGUMENT: run.stream}
        given = {"position_ids": of_passes, "past_key_values": past, **kwargs, **stream, "return_dict": True}
        if start:
            return run_in_two(self.language_model, run, start, of_rows, **given)
        return self.language_model(attention_mask=run.mask, inputs_embeds=run.embeds, **given)

    def _shared_start(self, run: Run, past: Any, kwargs: dict[str, Any]) -> int:
        """Returns how many tokens run once for all passes; with attention of media beside or both ways none do."""
        fusion = self.config.fusion
        if fusion["attention"] != "none" or isinstance(run.mask, dict):
            return 0
        dropping = self.training and fusion["modality_dropout"] > 0
        kinds, passes = run.state.kinds, run.passes.count
        return shared_start(self.language_model, kinds, passes, past, kwargs, words_alone=dropping)


class CompositeForConditionalGeneration(CompositePreTrainedModel, GenerationMixin):
    """The composite model with its language model head."""

    def __init__(self, config: CompositeConfig) -> None:
        super().__init__(config)
        self.model = CompositeModel(config)
        text = config.text_config
        head = nn.Linear if config.fusion["mode"] == "early" else MixingHead
        self.lm_head = head(text.hidden_size, text.vocab_size, bias=False)
        own = self.model.get_input_embeddings().weight
        names = (name for name, parameter in self.model.named_parameters() if parameter is own)
        self._tied_weights_keys = {"lm_head.weight": f"model.{next(names)}"}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Returns the head."""
        return self.lm_head

    def get_image_features(
        self, pixel_values: torch.Tensor, frame_milliseconds: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Returns what ``CompositeModel.get_image_features`` does."""
        return self.model.get_image_features(pixel_values, frame_milliseconds, **kwargs)

    def get_audio_features(
        self, input_features: torch.Tensor, feature_attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Returns what ``CompositeModel.get_audio_features`` does."""
        return self.model.get_audio_features(input_features, feature_attention_mask, **kwargs)

    def get_behaviour_features(self, history_ids: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Returns what ``CompositeModel.get_behaviour_features`` does."""
        return self.model.get_behaviour_features(history_ids, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        frame_milliseconds: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        feature_attention_mask: torch.Tensor | None = None,
        history_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        user_turns: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        fusion_state: FusionState | None = None,
        **kwargs: Any,
    ) -> CompositeOutput:
        """Returns ``logits`` ``(B, T, V)``, and the mean ``loss`` where ``labels`` are given.

        Args: See ``CompositeModel.forward``; ``labels`` is ``(B, T)`` with -100 where there is no loss,
            ``logits_to_keep`` the last places, or the places, that logits are made for.

        Raises:
            ValueError: In training, the model cannot tell prompt from answer.
        """
        if prompt_mask is None and labels is not None:
            prompt_mask = (labels != -100).cumsum(1) == 0
        if prompt_mask is None and self.training and self.config.reads_prompt:
            raise ValueError("this fusion would see the answer: give prompt_mask, 1 before the first answer")
        made = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            frame_milliseconds=frame_milliseconds,
            input_features=input_features,
            feature_attention_mask=feature_attention_mask,
            history_ids=history_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            prompt_mask=prompt_mask,
            user_turns=user_turns,
            mm_encoder_outputs=mm_encoder_outputs,
            fusion_state=fusion_state,
            **kwargs,
        )
        predict(self.lm_head, slice_logits_to_keep(made.last_hidden_state, logits_to_keep), made, self.config)
        if labels is not None:
            usual = partial(self.loss_function, vocab_size=self.config.text_config.vocab_size)
            made.loss = loss_of_labels(made, labels, usual, training=self.training, **kwargs)
        return made

    def _supports_mm_encoder_outputs(self) -> bool:
        # A resampler that reads the instruction needs the text, so images are encoded with it.
        return not any(self.config.resampler_reads(name) for name in self.config.modalities)

    def _update_model_kwargs_for_generation(  # type: ignore[override]
        self, outputs: Any, model_kwargs: dict[str, Any], **more: Any
    ) -> dict[str, Any]:
        """Carries the fusion's state on to the next token, to which the keys and values tell of the histories."""
        kept = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **more)
        if outputs.fusion_state is not None:
            kept.pop("history_ids", None)
        return {**kept, "fusion_state": outputs.fusion_state}

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> Any:
        """Repeats rows for beams, and their sounds and histories with them where each row has one."""
        for name, media in (("audio", kwargs.get("input_features")), ("behaviour", kwargs.get("history_ids"))):
            if expand_size > 1 and media is not None:
                shown = self.model.placeholders(name, input_ids, kwargs.get("inputs_embeds"))
                if int(shown.any(-1).sum()) != len(media):
                    raise CapabilityError(
                        f"beams go with rows of one {name} medium at most", "use num_beams=1", "beams_of_media"
                    )
        repeat: Any = super()._expand_inputs_for_generation  # type: ignore[misc]
        return repeat(expand_size, is_encoder_decoder, input_ids, **kwargs)

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        if self.config.fusion["mode"] != "early":
            raise CapabilityError(
                f"beams do not go with {self.config.fusion['mode']} fusion", "use num_beams=1", "fusion_has_no_beams"
            )
        return super()._beam_search(*args, **kwargs)  # type: ignore[misc]
