"""A rule for token counts is checked on real files before it is trusted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmtune.encoding.media_tokens import MediaCounter, process_audio, process_images
from mmtune.encoding.refused import Refused
from mmtune.errors import DataError
from mmtune.records import Medium


def check_counts(
    counter: MediaCounter, processor: Any, media_root: Path, media: Iterable[Medium], files: int = 3
) -> int:
    """Compares header counts with the real processor on a few files; returns how many were compared.

    Where they differ the counter gives its rules up and runs the processor from then on. Files
    that cannot be read or processed are passed over; their rows are dealt with on their own.

    Args:
        counter: Counts from headers.
        processor: The family's processor.
        media_root: Folder that media paths are relative to.
        media: Candidates; the first few images and sounds of different sizes are taken.
        files: How many files of each modality to look at.
    """
    # A history has no header to be wrong.
    seen: dict[str, set[tuple[int, int, int]]] = {"image": set(), "audio": set()}
    compared = 0
    for medium in media:
        sizes = seen.get(medium.modality)
        size = (medium.width, medium.height, medium.frames)
        if sizes is None or size in sizes or len(sizes) >= files:
            continue
        sizes.add(size)
        try:
            counter.placeholder(medium.modality)
            text = _real(processor, media_root, medium)
            counter.check(medium, text)
        except (Refused, DataError, ValueError, ArithmeticError, LookupError, TypeError, RuntimeError):
            continue
        compared += 1
    return compared


def _real(processor: Any, media_root: Path, medium: Medium) -> str:
    from mmtune.media.load import load_audio, load_image

    if medium.modality == "image":
        return process_images(processor, [[load_image(media_root, medium)]])[1][0]
    rate = processor._audio_processor.sampling_rate
    return process_audio(processor, [load_audio(media_root, medium, rate)])[1][0]
