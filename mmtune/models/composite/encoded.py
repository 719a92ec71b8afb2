"""The media of a batch once through towers and projectors, for every objective that reads them.

Shapes: B rows, T tokens, N media of a modality, M their tokens, H model width, D numbers of a summary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmtune.models.composite.features import Media
from mmtune.models.composite.fuse import Row, kinds_at
from mmtune.models.inputs import PADDING

MEDIA_INPUTS = ("pixel_values", "frame_milliseconds", "input_features", "feature_attention_mask", "history_ids")
"""What ``EncodedMedia.outputs`` stands in for."""
_SIDE = 8
"""A picture is summed up by so many by so many means, a sound by so many spans of time."""
_TIME_FIRST = ("audio-spectrogram-transformer",)
"""Sound encoders that take spectra as (time, bands)."""
_HASH = 2_654_435_761


@dataclass(frozen=True)
class EncodedMedia:
    """The media of one modality.

    Attributes:
        features: ``(M, H)`` all tokens of all media, in order.
        row_of_token: ``(M,)``.
        row_of_medium: ``(N,)``.
    """

    features: torch.Tensor
    row_of_token: torch.Tensor
    row_of_medium: torch.Tensor

    def pooled(self, rows: int) -> torch.Tensor:
        """Returns ``(B, H)`` the mean feature of each row's media, in fp32; zero where it has none."""
        return _mean_by_row(self.features.float(), self.row_of_token, rows)

    def present(self, rows: int) -> torch.Tensor:
        """Returns ``(B,)`` which rows have such media."""
        return torch.bincount(self.row_of_token, minlength=rows) > 0


def encode_media(model: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, EncodedMedia]:
    """Returns what towers and projectors make of a batch's media, by modality; one that it lacks is left out.

    No resampler reads the question here, but zeros in its place, as of a user without words: what hides words, or
    compares media with them, may not find them in the media's own tokens.

    Args:
        model: A ``CompositeModel``.
        batch: As for its forward pass.
    """
    ids = batch["input_ids"]
    words = model.get_input_embeddings()(ids)
    where = {name: model.placeholders(name, ids, words) for name in model.config.modalities}
    nothing = torch.zeros_like(ids)
    row = Row(words, kinds_at(where, words), batch["attention_mask"], nothing.bool(), nothing, None)
    pixels, milliseconds, sounds, sound_mask, histories = (batch.get(name) for name in MEDIA_INPUTS)
    media = Media(pixels, milliseconds, sounds, sound_mask, histories, None)
    found = {}
    for name, own in model.encode(media, where, row).items():
        row_of_token = where[name].nonzero()[:, 0]
        starts = torch.tensor([0, *(len(part) for part in own[:-1])], device=ids.device).cumsum(0)
        found[name] = EncodedMedia(torch.cat(own), row_of_token, row_of_token[starts])
    return found


def outputs(media: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Returns features ``(M, H)`` by modality as the model takes them in place of media: ``mm_encoder_outputs``."""
    return {name: BaseModelOutputWithPooling(pooler_output=[own]) for name, own in media.items()}  # type: ignore[arg-type]


def summaries(
    config: Any, batch: Mapping[str, torch.Tensor], media: Mapping[str, EncodedMedia], rows: int
) -> dict[str, torch.Tensor]:
    """Returns ``(B, D)`` what each row's media are in short, by modality, as their encoders are given them.

    A picture is its means over 8 x 8 fields, a sound its bands' means over 8 spans of time (of samples: the mean
    loudness of 64 spans), a history how many of its items fall into each of 64 bins.

    Args:
        config: Of the composite model.
        batch: Pixels, sounds and histories.
        media: Of the same batch.
        rows: B.
    """
    found = {}
    if "image" in media:
        fields = functional.adaptive_avg_pool2d(batch["pixel_values"].float(), _SIDE).flatten(1)
        found["image"] = _mean_by_row(fields, media["image"].row_of_medium, rows)
    if "audio" in media:
        sounds, mask = batch["input_features"].float(), batch.get("feature_attention_mask")
        if sounds.ndim == 3 and (config.audio_config.model_type in _TIME_FIRST or sounds.shape[1] != _bands(config)):
            sounds = sounds.transpose(1, 2)
        lengths = [sounds.shape[-1]] * len(sounds) if mask is None else mask.sum(-1).tolist()
        found["audio"] = _mean_by_row(
            torch.stack([_sound(one[..., :length]) for one, length in zip(sounds, lengths, strict=True)]),
            media["audio"].row_of_medium,
            rows,
        )
    if "behaviour" in media:
        ids = batch["history_ids"]
        found["behaviour"] = _mean_by_row(word_summary(ids, ids != PADDING), media["behaviour"].row_of_medium, rows)
    return found


def word_summary(ids_BT: torch.Tensor, words_BT: torch.Tensor) -> torch.Tensor:
    """Returns ``(B, D)`` what each row's words, or items, are in short: how many fall into each of 64 bins.

    Feature hashing (Weinberger et al. 2009), so that a vocabulary of any size has one width.

    Args:
        ids_BT: Token ids.
        words_BT: Which of them are words that count.
    """
    bins_BT = (ids_BT * _HASH % 2**32) * _SIDE**2 // 2**32
    counts = torch.zeros(len(ids_BT), _SIDE**2, device=ids_BT.device)
    return counts.scatter_add(1, bins_BT, words_BT.float())


def summary_widths(config: Any) -> dict[str, int]:
    """Returns D by part, text among them, of a composite model's config."""
    found = dict.fromkeys(("text", *config.modalities), _SIDE**2)
    for name in config.modalities:
        if name == "image":
            found[name] *= int(getattr(config.vision_config, "num_channels", 3))
        elif name == "audio":
            bands = _bands(config)
            found[name] = _SIDE * bands if bands else found[name]
    return found


def _bands(config: Any) -> int:
    """Returns the bands of a sound's spectrum; 0 where the encoder hears samples."""
    return int(getattr(config.audio_config, "num_mel_bins", None) or 0)


def _sound(sound: torch.Tensor) -> torch.Tensor:
    if sound.ndim == 1:
        return functional.adaptive_avg_pool1d(sound.abs()[None], _SIDE**2)[0]
    return functional.adaptive_avg_pool1d(sound, _SIDE).flatten()


def _mean_by_row(values: torch.Tensor, row_of: torch.Tensor, rows: int) -> torch.Tensor:
    total = values.new_zeros(rows, values.shape[-1]).index_add(0, row_of, values)
    return total / torch.bincount(row_of, minlength=rows).clamp(min=1)[:, None]
