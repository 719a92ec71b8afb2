"""Video files through PyAV (the extra ``video``): the header, and evenly spaced frames."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

from mmtune.errors import CapabilityError
from mmtune.media.audio import float32
from mmtune.media.paths import MediaRefused
from mmtune.records import Medium

if TYPE_CHECKING:
    from PIL import Image


def probe_video(handle: IO[bytes], medium: Medium, *, max_pixels: int, max_seconds: float, decode: bool) -> Medium:
    """Returns the medium with its size (after rotation), frames, frames per second and seconds.

    The first frame is always decoded, with ``decode`` all of them: ``frames`` is then the number
    really in the file and not what the header says.

    Raises:
        MediaRefused: ``decode_error``, ``too_long`` or ``too_many_pixels``.
        CapabilityError: PyAV is not installed.
    """
    with _container(handle, medium) as (container, stream):
        _check_size(stream, medium, max_pixels)
        fps = float(stream.average_rate or stream.base_rate or 0)
        duration = _seconds(container, stream)
        if duration > max_seconds:
            raise MediaRefused("too_long", f"{medium.path!r} is {duration:.1f} s long; the cap is {max_seconds:g} s")
        first = next(container.decode(stream), None)
        if first is None:
            raise MediaRefused("decode_error", f"{medium.path!r} has no frames")
        turned = abs(int(getattr(first, "rotation", 0) or 0)) % 180 == 90
        width, height = (first.height, first.width) if turned else (first.width, first.height)
        frames = stream.frames or round(duration * fps)
        if decode:
            frames = 1 + sum(1 for _ in container.decode(stream))
        elif frames < 1:
            container.seek(0)
            frames = sum(1 for packet in container.demux(stream) if packet.size)
    if frames < 1 or fps <= 0:
        raise MediaRefused("decode_error", f"{medium.path!r} names no frame rate or has no frames")
    seconds = duration or frames / fps
    if seconds > max_seconds:
        raise MediaRefused("too_long", f"{medium.path!r} is {seconds:.1f} s long; the cap is {max_seconds:g} s")
    return replace(medium, width=width, height=height, frames=frames, fps=float32(fps), seconds=float32(seconds))


def decode_frames(handle: IO[bytes], medium: Medium, count: int, max_pixels: int) -> list[Image.Image]:
    """Returns ``count`` RGB frames, evenly spaced from the first to the last, upright.

    A file with fewer frames than ``count`` repeats some. When fewer frames can be decoded than
    the header promised, the last one stands in for those after it.

    Raises:
        MediaRefused: ``decode_error`` or ``too_many_pixels``.
        CapabilityError: PyAV is not installed.
    """
    wanted = frame_places(medium.frames, count)
    kept: dict[int, Image.Image] = {}
    last: Any = None
    with _container(handle, medium) as (container, stream):
        _check_size(stream, medium, max_pixels)
        stream.thread_type = "AUTO"
        for at, frame in enumerate(container.decode(stream)):
            last = frame
            if at in wanted:
                kept[at] = _upright(frame)
            if at >= wanted[-1]:
                break
        if last is None:
            raise MediaRefused("decode_error", f"{medium.path!r} has no frames")
        end = _upright(last) if any(place not in kept for place in wanted) else None
    return [kept.get(place, end) for place in wanted]  # type: ignore[misc]


def frame_places(frames: int, count: int) -> list[int]:
    """Returns ``count`` frame numbers evenly spaced over ``frames``, both ends included."""
    if count == 1 or frames <= 1:
        return [0] * count
    return [(2 * at * (frames - 1) + (count - 1)) // (2 * (count - 1)) for at in range(count)]


def _upright(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    rotation = int(getattr(frame, "rotation", 0) or 0)
    return image.rotate(rotation, expand=True) if rotation % 360 else image


def _check_size(stream: Any, medium: Medium, max_pixels: int) -> None:
    if stream.width * stream.height > max_pixels:
        raise MediaRefused("too_many_pixels", f"{medium.path!r} is {stream.width}x{stream.height}")


def _seconds(container: Any, stream: Any) -> float:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return float(container.duration / 1_000_000) if container.duration else 0.0


@contextmanager
def _container(handle: IO[bytes], medium: Medium) -> Iterator[tuple[Any, Any]]:
    if importlib.util.find_spec("av") is None:
        raise CapabilityError(
            f"{medium.path!r} is a video and PyAV is not installed", 'pip install "mmtune[video]"', "missing_extra"
        )
    import av

    # Its messages go straight to stderr and would break the one-message rule.
    av.logging.set_level(None)
    try:
        with av.open(handle) as container:
            if not container.streams.video:
                raise MediaRefused("decode_error", f"{medium.path!r} has no video stream")
            yield container, container.streams.video[0]
    except (av.FFmpegError, ValueError, IndexError, OverflowError, ZeroDivisionError) as error:
        raise MediaRefused("decode_error", f"{medium.path!r} is damaged or not a video that can be read") from error
