"""Sound files: what the header tells, and mono float32 samples at a wanted rate.

Read with soundfile (WAV, FLAC, OGG, MP3; the extra ``audio``). Without it, plain PCM WAV is
read with the standard library.
"""

from __future__ import annotations

import importlib.util
import math
import struct
import wave
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

from mmtune.errors import CapabilityError
from mmtune.media.file_end import missing_end
from mmtune.media.paths import MediaRefused
from mmtune.records import Medium

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Samples = NDArray[np.float32]

_BLOCK_FRAMES = 1 << 18
_MAX_CHANNELS = 64
_MAX_RATE_HZ = 768_000


def has_soundfile() -> bool:
    """Says whether soundfile is installed."""
    return importlib.util.find_spec("soundfile") is not None


def probe_audio(handle: IO[bytes], medium: Medium, *, max_seconds: float, decode: bool) -> Medium:
    """Returns the medium with its frames, rate and seconds.

    With ``decode`` every sample is read once, and ``frames`` is the number really found.

    Raises:
        MediaRefused: ``decode_error``, ``too_long``, or ``bad_samples`` for NaN and infinity.
        CapabilityError: The file is no plain WAV and soundfile is not installed.
    """
    rate, frames, blocks = _open(handle, medium)
    _check_length(medium, frames, rate, max_seconds)
    if decode:
        frames = _count(blocks, medium, int(max_seconds * rate))
    if frames < 1:
        raise MediaRefused("decode_error", f"{medium.named} has no samples")
    return replace(medium, frames=frames, sample_rate_hz=rate, seconds=float32(frames / rate))


def decode_audio(handle: IO[bytes], medium: Medium, sample_rate_hz: int, max_seconds: float) -> Samples:
    """Returns the whole sound as float32 mono, shape ``(frames,)``, resampled when rates differ.

    Channels are averaged. For the resampling see ``resample``.

    Raises:
        MediaRefused: ``decode_error``, ``too_long`` or ``bad_samples``.
    """
    import numpy as np

    rate, frames, blocks = _open(handle, medium)
    _check_length(medium, frames, rate, max_seconds)
    kept = []
    total = 0
    for block in blocks:
        total += len(block)
        if total > max_seconds * rate:
            raise MediaRefused("too_long", f"{medium.named} is longer than {max_seconds:g} s")
        kept.append(block.mean(axis=1, dtype=np.float32))
    samples = np.concatenate(kept) if kept else np.zeros(0, np.float32)
    if not len(samples):
        raise MediaRefused("decode_error", f"{medium.named} has no samples")
    if not np.isfinite(samples).all():
        raise MediaRefused("bad_samples", f"{medium.named} holds samples that are not numbers")
    return resample(samples, rate, sample_rate_hz)


def float32(value: float) -> float:
    """Returns the nearest 32-bit float, which is what the dataset stores."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _check_length(medium: Medium, frames: int, rate: int, max_seconds: float) -> None:
    if rate < 1 or rate > _MAX_RATE_HZ:
        raise MediaRefused("decode_error", f"{medium.named} names a sample rate of {rate} Hz")
    if frames / rate > max_seconds:
        raise MediaRefused("too_long", f"{medium.named} is {frames / rate:.1f} s long; the cap is {max_seconds:g} s")


def _count(blocks: Any, medium: Medium, most: int) -> int:
    import numpy as np

    frames = 0
    for block in blocks:
        frames += len(block)
        if frames > most:
            raise MediaRefused("too_long", f"{medium.named} is longer than its header says, and than the cap")
        if not np.isfinite(block).all():
            raise MediaRefused("bad_samples", f"{medium.named} holds samples that are not numbers")
    return frames


def _open(handle: IO[bytes], medium: Medium) -> tuple[int, int, Any]:
    """Returns rate, frames by the header, and an iterator of float32 blocks (frames, channels)."""
    cut = missing_end(handle)
    if cut:
        raise MediaRefused("decode_error", f"{medium.named} is cut: {cut}")
    if has_soundfile():
        return _open_soundfile(handle, medium)
    return _open_wave(handle, medium)


def _open_soundfile(handle: IO[bytes], medium: Medium) -> tuple[int, int, Any]:
    import soundfile

    try:
        sound = soundfile.SoundFile(handle)
    except (soundfile.SoundFileError, RuntimeError, TypeError, OSError) as error:
        raise MediaRefused("decode_error", f"{medium.named} is not a sound file that can be read") from error
    if sound.channels > _MAX_CHANNELS:
        raise MediaRefused("decode_error", f"{medium.named} has {sound.channels} channels")

    def blocks() -> Any:
        try:
            while len(block := sound.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
                yield block
        except (soundfile.SoundFileError, RuntimeError) as error:
            raise MediaRefused("decode_error", f"{medium.named} is damaged: its samples cannot be read") from error

    return sound.samplerate, sound.frames, blocks()


def _open_wave(handle: IO[bytes], medium: Medium) -> tuple[int, int, Any]:
    import numpy as np

    head = handle.read(12)
    handle.seek(0)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        raise CapabilityError(
            f"{medium.named} is no WAV file; other sounds need soundfile",
            'pip install "mmtune[audio]"',
            "missing_extra",
        )
    try:
        sound = wave.open(handle, "rb")  # noqa: SIM115
        width, channels = sound.getsampwidth(), sound.getnchannels()
    except (wave.Error, EOFError, OSError) as error:
        raise MediaRefused("decode_error", f"{medium.named} is not a PCM WAV file") from error
    if width not in (1, 2, 3, 4) or not 1 <= channels <= _MAX_CHANNELS:
        raise MediaRefused("decode_error", f"{medium.named} has {8 * width}-bit samples in {channels} channels")

    def blocks() -> Any:
        while raw := sound.readframes(_BLOCK_FRAMES):
            raw = raw[: len(raw) - len(raw) % (width * channels)]
            yield _pcm(np.frombuffer(raw, np.uint8), width).reshape(-1, channels)

    return sound.getframerate(), sound.getnframes(), blocks()


def _pcm(raw: Any, width: int) -> Any:
    import numpy as np

    if width == 1:
        return (raw.astype(np.float32) - 128) / 128
    if width == 3:
        padded = np.zeros((len(raw) // 3, 4), np.uint8)
        padded[:, 1:] = raw.reshape(-1, 3)
        return (padded.view("<i4")[:, 0] / 2**31).astype(np.float32)
    return (raw.view(f"<i{width}") / 2 ** (8 * width - 1)).astype(np.float32)


def resample(samples: Samples, rate_hz: int, wanted_hz: int) -> Samples:
    """Returns ``samples`` at another rate, ``ceil(len * wanted / rate)`` of them.

    Polyphase FIR: a sinc windowed by Kaiser (beta 5), ten zero crossings on each side, the
    same design and alignment as ``scipy.signal.resample_poly``, computed in float64.
    """
    import numpy as np

    if rate_hz == wanted_hz:
        return samples
    divisor = math.gcd(rate_hz, wanted_hz)
    up, down = wanted_hz // divisor, rate_hz // divisor
    most = max(up, down)
    half = 10 * most
    at = np.arange(-half, half + 1)
    taps = np.sinc(at / most) * np.kaiser(2 * half + 1, 5.0)
    taps *= up / taps.sum()
    per_phase = -(-len(taps) // up)
    phases = np.zeros((up, per_phase))
    for phase in range(up):
        own = taps[phase::up]
        phases[phase, : len(own)] = own
    length = -(-len(samples) * up // down)
    left = per_phase
    padded = np.pad(samples.astype(np.float64), (left, left))
    out = np.empty(length, np.float32)
    reach = np.arange(per_phase)
    for start in range(0, length, 1 << 16):
        place = np.arange(start, min(length, start + (1 << 16))) * down + half
        first = place // up
        index = np.clip(first[:, None] - reach + left, 0, len(padded) - 1)
        out[start : start + len(place)] = np.einsum("nk,nk->n", padded[index], phases[place % up])
    return out
