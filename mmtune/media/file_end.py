"""Whether the end of a sound or video file is missing: decoders read what is left and say nothing.

Containers tell the length of their parts: RIFF (WAV, AVI), AIFF, MP4, Matroska and WebM, Ogg, and an MP3 with a Xing
or Info header. Of other files nothing is known here; FLAC's decoder tells by itself.
"""

from __future__ import annotations

import os
import struct
from typing import IO

_UNKNOWN_BYTES = 0x7FFF_0000
"""A WAV header written to a pipe, before the length was known, tells this or more."""
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_MP4 = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp")


def missing_end(handle: IO[bytes]) -> str:
    """Says what is missing, such as ``its header tells 44,144 bytes, 200 are there``; empty where nothing is."""
    if not handle.seekable():
        return ""
    size = handle.seek(0, os.SEEK_END)
    head = _read(handle, 0, 12)
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        end = _end_of_samples(handle, size, "<4sI", b"data")
    elif head[:4] == b"FORM" and head[8:] in (b"AIFF", b"AIFC"):
        end = _end_of_samples(handle, size, ">4sI", b"SSND")
    elif head[:4] == b"RIFF" and head[8:] == b"AVI ":
        end = _end_of_avi(handle, size)
    elif head[:4] == b"OggS":
        end = _end_of_pages(handle, size)
    elif head[:4] == _EBML:
        end = _end_of_segment(handle)
    elif head[4:8] in _MP4:
        end = _end_of_boxes(handle, size)
    else:
        end = _end_of_mp3(handle, head)
    handle.seek(0)
    return f"its header tells {end:,} bytes, {size:,} are there" if size < end else ""


def _read(handle: IO[bytes], at: int, count: int) -> bytes:
    handle.seek(at)
    return handle.read(count)


def _end_of_samples(handle: IO[bytes], size: int, form: str, wanted: bytes) -> int:
    """Returns the end of the chunk of samples in RIFF or AIFF; chunks are padded to an even number of bytes."""
    at = 12
    while at + 8 <= size:
        name, length = struct.unpack(form, _read(handle, at, 8))
        if name == wanted:
            return at + 8 + length if length < _UNKNOWN_BYTES else 0
        at += 8 + length + length % 2
    return 0


def _end_of_avi(handle: IO[bytes], size: int) -> int:
    """Returns the end of the last of the RIFF chunks in a row, which large AVI files have several of."""
    at = end = 0
    while at + 8 <= size and (head := _read(handle, at, 8))[:4] == b"RIFF":
        length = struct.unpack("<I", head[4:])[0]
        end = at + 8 + length if length else 0
        at += 8 + length + length % 2
    return end


def _end_of_pages(handle: IO[bytes], size: int) -> int:
    """Returns the end of the last Ogg page (RFC 3533)."""
    at = 0
    while at < size:
        page = _read(handle, at, 27 + 255)
        if page[:4] != b"OggS"[: len(page)]:
            return 0
        segments = page[26] if len(page) > 26 else 1
        at += 27 + segments + sum(page[27 : 27 + segments])
    return at


def _end_of_segment(handle: IO[bytes]) -> int:
    """Returns the end of the Segment of Matroska or WebM; 0 where its length is unknown, as in a live recording."""
    length, width, _ = _length(_read(handle, 4, 8))
    at = 4 + width + length
    if _read(handle, at, 4) != _SEGMENT:
        return 0
    length, width, known = _length(_read(handle, at + 4, 8))
    return at + 4 + width + length if known else 0


def _length(raw: bytes) -> tuple[int, int, bool]:
    """Returns a length of EBML, the bytes that it is written in, and whether it is known (RFC 8794)."""
    width = 9 - raw[0].bit_length() if raw and raw[0] else 8
    value = int.from_bytes(raw[:width], "big") & ((1 << 7 * width) - 1)
    return value, width, value != (1 << 7 * width) - 1


def _end_of_boxes(handle: IO[bytes], size: int) -> int:
    """Returns the end of the last box of an MP4 file; 0 where it reaches to wherever the file ends, or is none."""
    at = 0
    while at + 8 <= size:
        head = _read(handle, at, 16)
        length = struct.unpack(">I", head[:4])[0]
        if length == 1 and len(head) == 16:
            length = struct.unpack(">Q", head[8:])[0]
        if length < 8 or not head[4:8].isalnum():
            return 0
        at += length
    return at


def _end_of_mp3(handle: IO[bytes], head: bytes) -> int:
    """Returns the end of the last frame, where the first has a Xing or Info header that tells it."""
    start = 0
    if head[:3] == b"ID3" and len(head) >= 10:
        # The length of the tag in four bytes of seven bits each.
        start = 10 + sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    frame = _read(handle, start, 64)
    if len(frame) < 64 or frame[0] != 0xFF or frame[1] & 0xE6 != 0xE2:
        return 0
    first_version, mono = frame[1] & 0x18 == 0x18, frame[3] >> 6 == 3
    tag = 4 + ((17 if mono else 32) if first_version else (9 if mono else 17))
    flags = frame[tag + 7]
    if frame[tag : tag + 4] not in (b"Xing", b"Info") or not flags & 2:
        return 0
    return start + int(struct.unpack_from(">I", frame, tag + 8 + 4 * (flags & 1))[0])
