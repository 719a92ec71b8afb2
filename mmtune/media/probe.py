"""The header probe: a Medium with what its file tells, or the reason it is refused."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from mmtune.media.audio import probe_audio
from mmtune.media.image import probe_image
from mmtune.media.paths import open_medium
from mmtune.media.video_process import probe_apart
from mmtune.records import Medium


@dataclass(frozen=True, slots=True)
class ProbeLimits:
    """What a medium may be, and how closely it is looked at.

    Attributes:
        decode: Read each medium whole, as proof that it is not damaged.
        hash_bytes: Fill in ``sha256``.
        embed: Fill in ``data``.
    """

    max_image_pixels: int = 89_000_000
    max_audio_seconds: float = 600.0
    max_video_seconds: float = 600.0
    decode: bool = True
    hash_bytes: bool = False
    embed: bool = False


def probe_medium(root: Path | str, medium: Medium, limits: ProbeLimits) -> Medium:
    """Returns the medium with size and header facts filled in.

    Raises:
        MediaRefused: The path is unsafe or the file unusable; ``code`` tells why.
        CapabilityError: An extra is missing that this medium needs.
    """
    handle, size = open_medium(root, medium)
    with handle:
        if medium.modality == "image":
            probed = probe_image(handle, medium, max_pixels=limits.max_image_pixels, decode=limits.decode)
        elif medium.modality == "audio":
            probed = probe_audio(handle, medium, max_seconds=limits.max_audio_seconds, decode=limits.decode)
        else:
            probed = probe_apart(
                handle,
                medium,
                max_pixels=limits.max_image_pixels,
                max_seconds=limits.max_video_seconds,
                decode=limits.decode,
            )
    if not (limits.hash_bytes or limits.embed):
        return replace(probed, size_bytes=size)
    handle, _ = open_medium(root, medium)
    with handle:
        data = handle.read()
    return replace(
        probed,
        size_bytes=size,
        sha256=hashlib.sha256(data).hexdigest() if limits.hash_bytes else "",
        data=data if limits.embed or medium.data is not None else None,
    )
