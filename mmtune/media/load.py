"""Decoded media at the moment of use. A Medium with ``data`` is read from its bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmtune.media.audio import decode_audio
from mmtune.media.image import decode_image
from mmtune.media.paths import open_medium
from mmtune.media.video_process import decode_frames_apart
from mmtune.records import Medium

if TYPE_CHECKING:
    from PIL import Image

    from mmtune.media.audio import Samples

MAX_IMAGE_PIXELS = 89_000_000
MAX_AUDIO_SECONDS = 600.0


def load_image(root: Path | str, medium: Medium) -> Image.Image:
    """Returns an RGB image, EXIF-rotated, transparent parts over white.

    Raises:
        MediaRefused: The file is gone, unsafe or damaged (exit 3).
    """
    handle, _ = open_medium(root, medium)
    with handle:
        # A medium whose header was accepted once under a higher cap is accepted here too.
        return decode_image(handle, medium, max(MAX_IMAGE_PIXELS, medium.width * medium.height))


def load_audio(root: Path | str, medium: Medium, sample_rate_hz: int) -> Samples:
    """Returns a sound as float32 mono of shape ``(frames,)`` at the wanted rate.

    Raises:
        MediaRefused: The file is gone, unsafe, damaged or too long (exit 3).
    """
    handle, _ = open_medium(root, medium)
    with handle:
        return decode_audio(handle, medium, sample_rate_hz, max(MAX_AUDIO_SECONDS, medium.seconds + 1))


def load_video_frames(root: Path | str, medium: Medium, count: int) -> list[Image.Image]:
    """Returns ``count`` upright RGB frames, evenly spaced over the video.

    Raises:
        MediaRefused: The file is gone, unsafe or damaged (exit 3).
    """
    handle, _ = open_medium(root, medium)
    with handle:
        return decode_frames_apart(handle, medium, count, max(MAX_IMAGE_PIXELS, medium.width * medium.height))
