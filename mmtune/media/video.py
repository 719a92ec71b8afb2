"""Video files through PyAV (the extra ``video``): the header, and evenly spaced frames.

Called in a process of its own, see ``video_process``.
"""

from __future__ import annotations

import importlib.util
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

from mmtune.errors import CapabilityError
from mmtune.media.audio import float32
from mmtune.media.file_end import missing_end
from mmtune.media.paths import MediaRefused
from mmtune.records import Medium

if TYPE_CHECKING:
    from PIL import Image


_SEEK_BEYOND_FRAMES = 300
"""In a shorter video all frames are decoded up to the last one wanted."""


def check_pyav(medium: Medium) -> None:
    """Raises CapabilityError where PyAV is not installed."""
    if importlib.util.find_spec("av") is None:
        raise CapabilityError(
            f"{medium.named} is a video and PyAV is not installed", 'pip install "mmtune[video]"', "missing_extra"
        )


def probe_video(
    handle: IO[bytes],
    medium: Medium,
    *,
    max_pixels: int,
    max_seconds: float,
    decode: bool,
    begin: Callable[[float], None] = lambda seconds: None,
) -> Medium:
    """Returns the medium with its size (after rotation), frames, frames per second and seconds.

    The first frame is always decoded, with ``decode`` all of them: ``frames`` is then the number
    really in the file and not what the header says.

    Args:
        handle: The open file.
        medium: What to fill in.
        max_pixels: Refuse larger frames.
        max_seconds: Refuse longer videos, from their header.
        decode: Decode every frame.
        begin: Called with the length that the header names, before frames are decoded.

    Raises:
        MediaRefused: ``decode_error``, ``too_long`` or ``too_many_pixels``.
    """
    with _container(handle, medium) as (container, stream):
        _check_size(stream, medium, max_pixels)
        fps = float(stream.average_rate or stream.base_rate or 0)
        duration = _seconds(container, stream)
        if duration > max_seconds:
            raise MediaRefused("too_long", f"{medium.named} is {duration:.1f} s long; the cap is {max_seconds:g} s")
        begin(duration)
        first = next(container.decode(stream), None)
        if first is None:
            raise MediaRefused("decode_error", f"{medium.named} has no frames")
        turned = abs(int(getattr(first, "rotation", 0) or 0)) % 180 == 90
        width, height = (first.height, first.width) if turned else (first.width, first.height)
        frames = stream.frames or round(duration * fps)
        if decode:
            frames = 1 + sum(1 for _ in container.decode(stream))
        elif frames < 1:
            container.seek(0)
            frames = sum(1 for packet in container.demux(stream) if packet.size)
    if frames < 1 or fps <= 0:
        raise MediaRefused("decode_error", f"{medium.named} names no frame rate or has no frames")
    seconds = duration or frames / fps
    if seconds > max_seconds:
        raise MediaRefused("too_long", f"{medium.named} is {seconds:.1f} s long; the cap is {max_seconds:g} s")
    return replace(medium, width=width, height=height, frames=frames, fps=float32(fps), seconds=float32(seconds))


def decode_frames(handle: IO[bytes], medium: Medium, count: int, max_pixels: int) -> list[Image.Image]:
    """Returns ``count`` RGB frames, evenly spaced from the first to the last, upright.

    A file with fewer frames than ``count`` repeats some. When fewer frames can be decoded than
    the header promised, the last one stands in for those after it.

    Raises:
        MediaRefused: ``decode_error`` or ``too_many_pixels``.
    """
    wanted = frame_places(medium.frames, count)
    with _container(handle, medium) as (container, stream):
        _check_size(stream, medium, max_pixels)
        stream.thread_type = "AUTO"
        if wanted[-1] >= _SEEK_BEYOND_FRAMES:
            found = _by_seeking(container, stream, medium.frames, wanted)
            if found is not None:
                return found
            container.seek(0)
        return _from_the_start(container, stream, medium, wanted)


def _from_the_start(container: Any, stream: Any, medium: Medium, wanted: Sequence[int]) -> list[Image.Image]:
    kept: dict[int, Image.Image] = {}
    last: Any = None
    for at, frame in enumerate(container.decode(stream)):
        last = frame
        if at in wanted:
            kept[at] = _upright(frame)
        if at >= wanted[-1]:
            break
    if last is None:
        raise MediaRefused("decode_error", f"{medium.named} has no frames")
    end = _upright(last) if any(place not in kept for place in wanted) else None
    return [kept.get(place, end) for place in wanted]  # type: ignore[misc]


def _by_seeking(container: Any, stream: Any, frames: int, wanted: Sequence[int]) -> list[Image.Image] | None:
    """Returns frames by their times, decoded from the key frame before each; None where that is unsafe or slower.

    A frame is the one at its place among the sorted times of all packets, as in a decode from the
    start: the packets are counted, and each frame's time is compared.
    """
    packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(stream) if packet.size]
    if len(packets) != frames or any(time is None for time, _ in packets):
        return None
    times = sorted({time for time, _ in packets})
    keys = sorted({time for time, is_key in packets if is_key})
    if len(times) != frames or not keys or keys[0] != times[0]:
        return None
    places: dict[int, list[int]] = defaultdict(list)
    for place in wanted:
        places[keys[bisect_right(keys, times[place]) - 1]].append(place)
    number = {time: at for at, time in enumerate(times)}
    if 2 * sum(own[-1] - number[key] + 1 for key, own in places.items()) > wanted[-1]:
        return None
    kept: dict[int, Image.Image] = {}
    for key, own in places.items():
        container.seek(key, stream=stream)
        for frame in container.decode(stream):
            at = number.get(frame.pts)
            if at is None:
                return None
            if at in own:
                kept[at] = _upright(frame)
            if at >= own[-1]:
                break
    return [kept[place] for place in wanted] if all(place in kept for place in wanted) else None


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
        raise MediaRefused("too_many_pixels", f"{medium.named} is {stream.width}x{stream.height}")


def _seconds(container: Any, stream: Any) -> float:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return float(container.duration / 1_000_000) if container.duration else 0.0


@contextmanager
def _container(handle: IO[bytes], medium: Medium) -> Iterator[tuple[Any, Any]]:
    import av

    cut = missing_end(handle)
    if cut:
        raise MediaRefused("decode_error", f"{medium.named} is cut: {cut}")
    # Its messages go straight to stderr and would break the one-message rule.
    av.logging.set_level(None)
    try:
        with av.open(handle) as container:
            if not container.streams.video:
                raise MediaRefused("decode_error", f"{medium.named} has no video stream")
            yield container, container.streams.video[0]
    except (av.FFmpegError, ValueError, IndexError, OverflowError, ZeroDivisionError) as error:
        raise MediaRefused("decode_error", f"{medium.named} is damaged or not a video that can be read") from error
