"""Sounds to log-mel pictures of their own length, each on its own scale.

Shapes: B sounds, S samples, F frames, M mel bands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.audio_utils import mel_filter_bank

# Whisper's: eight decades below the loudest point are floor, and the scale is about -1 to 1.
_DECADES, _SHIFT = 8.0, 4.0
_HIGHEST_HZ = 8000.0


def log_mel(samples: np.ndarray, *, filters: np.ndarray, n_fft: int, hop_length: int) -> torch.Tensor:
    """Returns the log-mel picture of one sound, ``(M, F)`` with ``F = max(S, n_fft) // hop_length``.

    Whisper's features (Radford et al. 2022, arXiv:2212.04356) without its padding to 30 s: the loudest point is that
    of the sound itself. A sound shorter than one window is followed by silence.

    Args:
        samples: Mono, ``(S,)``.
        filters: ``(1 + n_fft // 2, M)``.
        n_fft: Samples of a window.
        hop_length: Samples between windows.
    """
    wave = torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))
    if len(wave) < n_fft:
        wave = torch.nn.functional.pad(wave, (0, n_fft - len(wave)))
    spectrum = torch.stft(wave, n_fft, hop_length, window=torch.hann_window(n_fft), return_complex=True)
    power = (spectrum[..., :-1].abs() ** 2).contiguous()
    mel = torch.from_numpy(filters).to(torch.float32).T @ power
    picture = mel.clamp(min=1e-10).log10()
    return (torch.maximum(picture, picture.max() - _DECADES) + _SHIFT) / _SHIFT


def frame_count(samples: int, n_fft: int, hop_length: int) -> int:
    """Returns the frames of a sound of so many samples."""
    return max(samples, n_fft) // hop_length


class LogMelFeatureExtractor(SequenceFeatureExtractor):
    """The feature extractor of ``LogMelModel``: ``input_features`` ``(B, M, F)`` and ``attention_mask`` ``(B, F)``.

    Args:
        feature_size: Mel bands, M.
        sampling_rate: Samples per second that the sounds must have.
        n_fft: Samples of a window.
        hop_length: Samples between windows.
        mel_mean: Taken from the log-mel values.
        mel_std: They are divided by it.
        padding_value: What follows a sound shorter than the longest of its batch.
    """

    model_input_names = ("input_features", "attention_mask")

    def __init__(
        self,
        feature_size: int = 80,
        sampling_rate: int = 16000,
        n_fft: int = 400,
        hop_length: int = 160,
        mel_mean: float = 0.0,
        mel_std: float = 1.0,
        padding_value: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.n_fft, self.hop_length = n_fft, hop_length
        self.mel_mean, self.mel_std = mel_mean, mel_std
        self.mel_filters = mel_filter_bank(
            num_frequency_bins=1 + n_fft // 2,
            num_mel_filters=feature_size,
            min_frequency=0.0,
            max_frequency=min(_HIGHEST_HZ, sampling_rate / 2),
            sampling_rate=sampling_rate,
            norm="slaney",
            mel_scale="slaney",
        )

    def __call__(
        self,
        raw_speech: np.ndarray | Sequence[np.ndarray],
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
        **unused: Any,
    ) -> BatchFeature:
        """Returns the padded log-mel pictures of some sounds and the mask of their frames.

        Args:
            raw_speech: One mono sound ``(S,)``, or several.
            sampling_rate: Of the sounds, checked where it is given.
            return_tensors: As everywhere in transformers.
            **unused: Padding and truncation as Whisper takes them: nothing is ever cut here.

        Raises:
            ValueError: The sounds have another sampling rate.
        """
        if sampling_rate not in (None, self.sampling_rate):
            raise ValueError(f"sounds at {sampling_rate} Hz were given, {self.sampling_rate} Hz are expected")
        sounds = [raw_speech] if isinstance(raw_speech, np.ndarray) and raw_speech.ndim == 1 else list(raw_speech)
        own: dict[str, Any] = {"filters": self.mel_filters, "n_fft": self.n_fft, "hop_length": self.hop_length}
        pictures = [(log_mel(sound, **own) - self.mel_mean) / self.mel_std for sound in sounds]
        longest = max(picture.shape[1] for picture in pictures)
        padded = torch.full((len(pictures), self.feature_size, longest), self.padding_value)
        mask = torch.zeros((len(pictures), longest), dtype=torch.long)
        for row, picture in enumerate(pictures):
            padded[row, :, : picture.shape[1]] = picture
            mask[row, : picture.shape[1]] = 1
        return BatchFeature({"input_features": padded, "attention_mask": mask}, tensor_type=return_tensors)
