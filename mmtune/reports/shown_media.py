"""Media as data URIs, small enough for a page: pictures, frames of videos, beginnings of sounds."""

from __future__ import annotations

import base64
import io
import wave
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmtune.errors import DataError
from mmtune.media.load import load_audio, load_image, load_video_frames
from mmtune.records import Medium

if TYPE_CHECKING:
    from PIL import Image

_SIDE_PX = 240
_SMALL_PX = 128
SOUND_SECONDS = 4
"""A sound is heard for so long."""
_MOST_HZ = 16_000


def picture(root: Path, medium: Medium) -> str:
    """Returns an image as a small data URI, or an empty string when it cannot be read."""
    try:
        return _drawn(load_image(root, medium))
    except DataError:
        return ""


def frames(root: Path, medium: Medium, count: int) -> list[str]:
    """Returns evenly spaced frames of a video as small data URIs; none when it cannot be read."""
    try:
        return [_drawn(frame) for frame in load_video_frames(root, medium, count)]
    except DataError:
        return []


def sound(root: Path, medium: Medium) -> str:
    """Returns the beginning of a sound as a data URI of 16-bit WAV, mono; an empty string when it cannot be read."""
    rate = min(medium.sample_rate_hz or _MOST_HZ, _MOST_HZ)
    try:
        samples = load_audio(root, medium, rate)[: SOUND_SECONDS * rate]
    except DataError:
        return ""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return _uri("audio/wav", buffer.getvalue())


def _drawn(image: Image.Image) -> str:
    from PIL import Image

    small = max(image.size) <= _SMALL_PX
    if not small:
        image.thumbnail((_SIDE_PX, _SIDE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Tiny pictures stay exact; photographs become JPEGs of a few kilobytes.
    kind = "png" if small else "jpeg"
    image.save(buffer, kind, quality=78)
    return _uri(f"image/{kind}", buffer.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
