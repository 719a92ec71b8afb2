"""Images: what the header tells, a whole decode as proof, and RGB pixels the right way up."""

from __future__ import annotations

import struct
import warnings
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

from mmtune.media.paths import MediaRefused
from mmtune.records import Medium

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats that are read; the decoder of any other is never called. Of an animation, the first frame."""

_KNOWN_REFUSED = (
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"8BPS", "PSD"),
    (b"%!PS", "EPS"),
    (b"%PDF", "PDF"),
    (b"SIMPLE  =", "FITS"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"<svg", "SVG"),
    (b"<?xml", "SVG or XML"),
)
_END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
_TAIL_BYTES = 1 << 16
_TRANSPOSE = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
"""EXIF orientation to PIL.Image.Transpose."""
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    struct.error,
    EOFError,
    MemoryError,
)
"""What Pillow's decoders raise on damaged files; their texts may carry memory addresses and are not repeated."""


def open_image(handle: IO[bytes], medium: Medium, max_pixels: int) -> Image.Image:
    """Returns a lazily opened image whose size is within the cap.

    Raises:
        MediaRefused: ``decode_error``, ``format_not_allowed`` or ``too_many_pixels``.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(handle, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise MediaRefused("too_many_pixels", f"{medium.named} has more than {max_pixels:,} pixels") from error
    except UnidentifiedImageError as error:
        raise _unidentified(handle, medium) from error
    except _DECODE_ERRORS as error:
        raise MediaRefused("decode_error", f"{medium.named} has a damaged image header") from error
    width, height = image.size
    if width * height > max_pixels:
        raise MediaRefused("too_many_pixels", f"{medium.named} is {width}x{height}; the cap is {max_pixels:,} pixels")
    if width < 1 or height < 1:
        raise MediaRefused("decode_error", f"{medium.named} is {width}x{height}")
    return image


def _unidentified(handle: IO[bytes], medium: Medium) -> MediaRefused:
    handle.seek(0)
    head = handle.read(64)
    if not head:
        return MediaRefused("decode_error", f"{medium.named} is empty")
    for magic, name in _KNOWN_REFUSED:
        if head.lstrip()[: len(magic)] == magic:
            return MediaRefused("format_not_allowed", f"{medium.named} is {name}; read are {', '.join(FORMATS)}")
    return MediaRefused("decode_error", f"{medium.named} is not an image")


def orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 when there is none or it cannot be read."""
    if "exif" not in image.info:
        return 1
    try:
        value = image.getexif().get(0x0112, 1)
    except _DECODE_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def probe_image(handle: IO[bytes], medium: Medium, *, max_pixels: int, decode: bool) -> Medium:
    """Returns the medium with its width and height as seen (after EXIF rotation).

    Args:
        handle: The open file.
        medium: What to fill in.
        max_pixels: Refuse larger images, from their header.
        decode: Decode every pixel once as proof that the file is whole; else only its end is looked at.

    Raises:
        MediaRefused: See ``open_image``; ``decode_error`` also for a file that is cut.
    """
    image = open_image(handle, medium, max_pixels)
    width, height = image.size
    if orientation(image) >= 5:
        width, height = height, width
    mark = _END_MARKS.get(image.format or "")
    if decode:
        _decode_whole(handle, image, medium)
    elif mark is not None and not _has_end(handle, mark):
        raise MediaRefused("decode_error", f"{medium.named} is cut: its end is missing")
    return replace(medium, width=width, height=height, frames=1)


def _has_end(handle: IO[bytes], mark: bytes) -> bool:
    size = handle.seek(0, 2)
    # Nearly always it is the very end; some cameras and editors leave bytes after it.
    for tail in (16, _TAIL_BYTES):
        handle.seek(max(0, size - tail))
        if mark in handle.read():
            return True
    return False


def _decode_whole(handle: IO[bytes], image: Image.Image, medium: Medium) -> None:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if image.format == "PNG":
                # Pillow's load() passes over check sums, and verify() ends the image's use.
                image.verify()
                handle.seek(0)
                image = Image.open(handle, formats=FORMATS)
            # An eighth of the size and no colour conversion: every byte of the file is still entropy-decoded.
            image.draft("L", (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except _DECODE_ERRORS as error:
        raise MediaRefused("decode_error", f"{medium.named} is damaged or cut: its pixels cannot be decoded") from error


def decode_image(handle: IO[bytes], medium: Medium, max_pixels: int) -> Image.Image:
    """Returns an RGB image, EXIF-rotated, transparent parts over white.

    Raises:
        MediaRefused: See ``open_image``.
    """
    image = open_image(handle, medium, max_pixels)
    turn = orientation(image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            image = to_rgb(image)
    except _DECODE_ERRORS as error:
        raise MediaRefused("decode_error", f"{medium.named} is damaged or cut: its pixels cannot be decoded") from error
    return image.transpose(_TRANSPOSE[turn]) if turn in _TRANSPOSE else image  # type: ignore[arg-type]


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns an RGB image of any mode; 16-bit grey keeps its brightness, alpha is put over white."""
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _sixteen_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _sixteen_bit(image: Image.Image) -> Image.Image:
    import numpy as np
    from PIL import Image

    values: Any = np.asarray(image).astype(np.int64)
    # Pillow's own conversion clips at 255, which turns a 16-bit picture white.
    return Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
