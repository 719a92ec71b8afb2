"""Real written and spoken digits as token features, for tests of what fusion can learn.

Shapes: B rows, N tokens, D width of a token's features.
"""

import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

SAMPLE_RATE_HZ = 8000
FRAMES = 64


@dataclass(frozen=True)
class Digits:
    """Tokens ``(B, N, D)`` and the digit of each row, ``(B,)``."""

    tokens: torch.Tensor
    digit: torch.Tensor

    def only(self, digits: tuple[int, ...]) -> "Digits":
        rows = torch.isin(self.digit, torch.tensor(digits))
        return Digits(self.tokens[rows], self.digit[rows])


def written_digits() -> tuple[Digits, Digits]:
    """Train and test rows of scikit-learn's digits: a token is a row of eight pixels."""
    raw = load_digits()
    tokens = torch.tensor(raw.images, dtype=torch.float32) / 8.0 - 1.0
    digit = torch.tensor(raw.target)
    return Digits(tokens[:1300], digit[:1300]), Digits(tokens[1300:], digit[1300:])


def spoken_digits(shared_datasets: Path) -> tuple[Digits, Digits]:
    """Train and test rows of fsdd, by its own rule (takes 0-4 are test): a token is 8 frames of 20 mel bands."""
    filters = mel_filter_bank(129, 20, 50.0, 4000.0, SAMPLE_RATE_HZ, norm="slaney", mel_scale="slaney")
    window = window_function(200, "hann")
    rows: dict[bool, list[tuple[np.ndarray, int]]] = {True: [], False: []}
    for path in sorted((shared_datasets / "fsdd" / "recordings").glob("*.wav")):
        digit, _, take = path.stem.split("_")
        with wave.open(str(path)) as sound:
            samples = np.frombuffer(sound.readframes(sound.getnframes()), "<i2") / 32768.0
        mel = spectrogram(samples, window, 200, 80, fft_length=256, power=2.0, mel_filters=filters, log_mel="log10")
        # Resampled in time to one length: a spoken digit is one word, said faster or slower.
        places = np.linspace(0, mel.shape[1] - 1, FRAMES).round().astype(int)
        rows[int(take) < 5].append((mel.T[places], int(digit)))
    tables = {test: np.stack([mel for mel, _ in found]) for test, found in rows.items()}
    mean, deviation = tables[False].mean((0, 1)), tables[False].std((0, 1))
    train, test = (
        Digits(
            torch.tensor((tables[part] - mean) / deviation, dtype=torch.float32).reshape(-1, FRAMES // 8, 160),
            torch.tensor([digit for _, digit in rows[part]]),
        )
        for part in (False, True)
    )
    return train, test


def pairs(written: Digits, spoken: Digits, rows: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Rows drawn apart: written tokens, spoken tokens, written digit, spoken digit."""
    one = torch.randint(len(written.digit), (rows,), generator=generator)
    other = torch.randint(len(spoken.digit), (rows,), generator=generator)
    return written.tokens[one], spoken.tokens[other], written.digit[one], spoken.digit[other]


def twins(written: Digits, spoken: Digits, rows: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Rows of one digit each: written tokens, spoken tokens, digit."""
    other = torch.randint(len(spoken.digit), (rows,), generator=generator)
    digit = spoken.digit[other]
    by_digit, counts = torch.argsort(written.digit, stable=True), torch.bincount(written.digit, minlength=10)
    place = (torch.rand(rows, generator=generator) * counts[digit]).long()
    one = by_digit[(counts.cumsum(0) - counts)[digit] + place]
    return written.tokens[one], spoken.tokens[other], digit
