"""Write data/sounds: short speech-like sounds of digit words, with questions about them and about a picture beside.

Nobody speaks here: every word is **synthetic**. A row of phones (``WORDS``) steers three formants; harmonics of a
falling pitch are as loud as the formants let them be, consonants are noise of one band. A voice is a pitch, a
formant scale (the length of the vocal tract), a pace and a softness; voices of one split are heard in no other.
Run from anywhere::

    python data/make_sounds.py            # writes data/sounds, about 20 seconds; needs data/scenes

The same seed gives the same sounds; NumPy and soundfile are all it needs.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SEED = 20261126
RATE_HZ = 8000
VOICES = {"train": 64, "val": 8, "test": 20}
FIRST_VOICE = {"train": 0, "val": 100, "test": 200}
PITCH_HZ = {"low": (85.0, 135.0), "high": (180.0, 255.0)}
TRACT_SCALE = {"low": (0.90, 1.00), "high": (1.06, 1.18)}
FORMANT_WIDTHS_HZ = (90.0, 130.0, 190.0)
SMOOTH_SECONDS = 0.03
FADE_SECONDS = 0.01
LONGEST_SECONDS = 0.75


@dataclass(frozen=True)
class Phone:
    """One sound of a word: how long, where its formants are, how much of it is voice, how much noise of which band."""

    seconds: float
    formants_hz: tuple[float, float, float]
    voice: float = 1.0
    noise: float = 0.0
    band_hz: tuple[float, float] = (2600.0, 3900.0)


_S = Phone(0.09, (400, 1700, 2600), 0.0, 0.5)
_N = Phone(0.07, (260, 1400, 2500), 0.35)
_SILENCE = Phone(0.04, (400, 1800, 2600), 0.0)
_AA = Phone(0.11, (740, 1100, 2450))
_F = Phone(0.08, (400, 1200, 2400), 0.0, 0.16, (900.0, 3900.0))
_R = Phone(0.06, (340, 1150, 1650), 0.7)

# Formants of vowels after Peterson and Barney (1952), men.
WORDS: tuple[tuple[str, tuple[Phone, ...]], ...] = (
    ("zero", (Phone(0.08, (300, 1700, 2500), 0.3, 0.3), Phone(0.07, (390, 1990, 2550)), _R,
              Phone(0.08, (530, 900, 2400)), Phone(0.08, (350, 760, 2300), 0.8))),
    ("one", (Phone(0.07, (300, 650, 2200), 0.7), Phone(0.13, (640, 1190, 2390)), _N, _N)),
    ("two", (_SILENCE, Phone(0.04, (350, 1600, 2500), 0.0, 0.6, (2000.0, 3900.0)),
             Phone(0.2, (300, 870, 2240)))),
    ("three", (Phone(0.07, (400, 1400, 2500), 0.0, 0.1, (1400.0, 3900.0)), _R, Phone(0.2, (270, 2290, 3010)))),
    ("four", (_F, Phone(0.15, (570, 840, 2410)), _R, _R)),
    ("five", (_F, _AA, Phone(0.1, (400, 1900, 2550)), Phone(0.07, (280, 1100, 2300), 0.3, 0.06, (900.0, 3900.0)))),
    ("six", (_S, Phone(0.09, (390, 1990, 2550)), _SILENCE, Phone(0.03, (400, 1800, 2600), 0.0, 0.4, (1300.0, 2600.0)),
             _S)),
    ("seven", (_S, Phone(0.09, (530, 1840, 2480)), Phone(0.05, (280, 1100, 2300), 0.3, 0.06, (900.0, 3900.0)),
               Phone(0.06, (600, 1200, 2400), 0.7), _N)),
    ("eight", (Phone(0.1, (480, 2000, 2600)), Phone(0.09, (330, 2250, 2800)), _SILENCE,
               Phone(0.05, (350, 1800, 2600), 0.0, 0.5, (2000.0, 3900.0)))),
    ("nine", (_N, _AA, Phone(0.1, (350, 2050, 2650)), _N)),
)  # fmt: skip


@dataclass(frozen=True)
class Voice:
    """Who says a word: nobody, but always in the same way."""

    number: int
    register: str
    pitch_hz: float
    tract_scale: float
    softness: float
    pace: float


@dataclass(frozen=True)
class Sound:
    """One word in one voice, and the noise of the room."""

    name: str
    word: str
    digit: int
    voice: Voice
    room: float
    seed: int


def make_voices(split: str) -> list[Voice]:
    """The voices of a split, low and high in turn."""
    rng = random.Random(f"{SEED}/voices/{split}")
    voices = []
    for place in range(VOICES[split]):
        register = ("low", "high")[place % 2]
        voices.append(
            Voice(
                FIRST_VOICE[split] + place,
                register,
                round(rng.uniform(*PITCH_HZ[register]), 1),
                round(rng.uniform(*TRACT_SCALE[register]), 3),
                round(rng.uniform(0.8, 1.3), 2),
                round(rng.uniform(0.85, 1.2), 2),
            )
        )
    return voices


def make_sounds(split: str) -> list[Sound]:
    """Every digit word in every voice of a split."""
    rng = random.Random(f"{SEED}/sounds/{split}")
    return [
        Sound(
            f"{word}_{voice.number:03d}.flac",
            word,
            digit,
            voice,
            round(rng.uniform(0.002, 0.01), 4),
            rng.randrange(2**31),
        )
        for voice in make_voices(split)
        for digit, (word, _) in enumerate(WORDS)
    ]


def smoothed(values: np.ndarray) -> np.ndarray:
    """Values over time without their steps: a moving mean of ``SMOOTH_SECONDS`` with the ends held."""
    width = int(SMOOTH_SECONDS * RATE_HZ) | 1
    held = np.pad(values, (width // 2, width // 2), mode="edge")
    return np.convolve(held, np.ones(width) / width, mode="valid")


def band_noise(rng: np.random.Generator, samples: int, band_hz: tuple[float, float]) -> np.ndarray:
    """Noise of one band, of deviation 1."""
    spectrum = np.fft.rfft(rng.normal(size=samples))
    hertz = np.fft.rfftfreq(samples, 1 / RATE_HZ)
    spectrum[(hertz < band_hz[0]) | (hertz > band_hz[1])] = 0
    made = np.fft.irfft(spectrum, samples)
    return made / made.std()


def voiced(pitch_hz: np.ndarray, formants_hz: np.ndarray, softness: float) -> np.ndarray:
    """Harmonics of a pitch ``(S,)``, each as loud as three formants ``(3, S)`` let it be."""
    number = np.arange(1, int(RATE_HZ / 2 / pitch_hz.min()) + 1)[:, None]
    hertz = number * pitch_hz
    loud = np.zeros_like(hertz)
    for place, width_hz in enumerate(FORMANT_WIDTHS_HZ):
        away = (hertz - formants_hz[place]) / (width_hz / 2)
        loud += 0.5**place / np.sqrt(1 + away**2)
    loud *= number**-softness * (hertz < RATE_HZ / 2 - 100)
    phase = 2 * np.pi * np.cumsum(pitch_hz) / RATE_HZ
    return (loud * np.sin(number * phase)).sum(0)


def say(sound: Sound) -> np.ndarray:
    """The samples of a sound at ``RATE_HZ``, ``(S,)``, at most 0.9 loud."""
    rng = np.random.default_rng(sound.seed)
    voice, phones = sound.voice, WORDS[sound.digit][1]
    lengths = [round(phone.seconds / voice.pace * rng.uniform(0.9, 1.1) * RATE_HZ) for phone in phones]
    whole = sum(lengths)

    def over_time(values: Sequence[float]) -> np.ndarray:
        return smoothed(np.repeat(np.array(values, float), lengths))

    formants = np.stack([over_time([phone.formants_hz[k] for phone in phones]) for k in range(3)])
    pitch = voice.pitch_hz * np.linspace(1.08, 0.88, whole) * (1 + 0.01 * np.sin(np.arange(whole) * 2e-3))
    made = voiced(pitch, formants * voice.tract_scale, voice.softness) * over_time([phone.voice for phone in phones])
    for band in dict.fromkeys(phone.band_hz for phone in phones if phone.noise):
        gain = over_time([phone.noise if phone.band_hz == band else 0.0 for phone in phones])
        made += 0.6 * gain * band_noise(rng, whole, band)
    fade = int(FADE_SECONDS * RATE_HZ)
    made[:fade] *= np.linspace(0, 1, fade)
    made[-fade:] *= np.linspace(1, 0, fade)
    made = 0.8 * made / np.abs(made).max() + sound.room * rng.normal(size=whole)
    return np.clip(made, -0.9, 0.9)[: int(LONGEST_SECONDS * RATE_HZ)]


def single_digits(split: str) -> dict[int, list[str]]:
    """File names of the pictures that show one digit alone, by digit."""
    document = json.loads((HERE / "scenes" / "annotations" / f"captions_{split}.json").read_text(encoding="utf-8"))
    found: dict[int, list[str]] = {digit: [] for digit in range(10)}
    for image in document["images"]:
        digits = image["scene"]["digits"]
        if len(digits) == 1:
            found[digits[0]["digit"]].append(image["file_name"])
    return found


def rows_of(split: str, sounds: Sequence[Sound]) -> Iterator[dict[str, object]]:
    """Four questions about every sound, of these one about a picture and the sound; half of those are true."""
    rng = random.Random(f"{SEED}/questions/{split}")
    pictures = single_digits(split)
    # Drawn, and not taken in turn: neither word and voice together nor one of them tell the answer.
    matches = [True, False] * (len(sounds) // 2)
    rng.shuffle(matches)
    for sound, same in zip(sounds, matches, strict=True):
        facts = {"audio": sound.name, "image": "", "word": sound.word, "voice": sound.voice.number}
        said = rng.choice(("Which word is said?", "What is the word?"))
        spoken = rng.choice(("Which digit is said?", "What digit do you hear?"))
        asked = [
            ("word", said, sound.word),
            ("digit", spoken, str(sound.digit)),
            ("voice", "Is the voice high or low?", sound.voice.register),
        ]
        for kind, question, answer in asked:
            yield {"id": f"{sound.name}/{kind}", "question_type": kind, "question": question, "answer": answer, **facts}
        shown = sound.digit if same else rng.choice([digit for digit in range(10) if digit != sound.digit])
        yield {
            "id": f"{sound.name}/match",
            "question_type": "match",
            "question": "Is the digit in the picture the one that is said?",
            "answer": "yes" if same else "no",
            **facts,
            "image": rng.choice(pictures[shown]),
            "shown": shown,
        }


def main() -> None:
    """Write every split below the folder given by ``--out``."""
    import soundfile

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "sounds")
    out: Path = parser.parse_args().out
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    for split in VOICES:
        folder = out / split
        folder.mkdir(exist_ok=True)
        sounds = make_sounds(split)
        for sound in sounds:
            soundfile.write(folder / sound.name, say(sound), RATE_HZ, subtype="PCM_S8")
        text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows_of(split, sounds))
        (out / "annotations" / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
