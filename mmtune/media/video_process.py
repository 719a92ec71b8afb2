"""Videos are decoded in a process of their own, with limits on time and memory.

FFmpeg reads files that nobody checked. A file that makes it hang, crash or fill the memory ends
that process, and is refused. The process is started at the first video of a thread and answers one
question after the other until that thread is gone. What it answers is JSON, and pixels of a size
that is checked; never a pickled object.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import IO, TYPE_CHECKING, Any

from mmtune.errors import MmtuneError, ResourceError
from mmtune.media.paths import MediaRefused
from mmtune.media.video import check_pyav, decode_frames, probe_video
from mmtune.records import Medium
from mmtune.signals import ignore_stops

if TYPE_CHECKING:
    from PIL import Image

LEAST_SECONDS = 60.0
"""Time for a header. All frames of a video may take this and twice its length."""
_MEMORY_BYTES = 16 << 30
_MOST_JSON = 1 << 20
_FACTS = ("width", "height", "frames", "fps", "seconds")
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from mmtune.media.video_process import serve; serve()"
)


def probe_apart(handle: IO[bytes], medium: Medium, *, max_pixels: int, max_seconds: float, decode: bool) -> Medium:
    """Returns what ``probe_video`` does.

    Raises:
        MediaRefused: As there, or ``decode_timeout``.
        CapabilityError: PyAV is not installed.
        ResourceError: The decoder was killed.
    """
    facts, _ = _ask(handle, medium, {"max_pixels": max_pixels, "max_seconds": max_seconds, "decode": decode})
    return replace(medium, **{name: type(getattr(medium, name))(facts[name]) for name in _FACTS})


def decode_frames_apart(handle: IO[bytes], medium: Medium, count: int, max_pixels: int) -> list[Image.Image]:
    """Returns what ``decode_frames`` does.

    Raises:
        MediaRefused: As there, or ``decode_timeout``.
        CapabilityError: PyAV is not installed.
        ResourceError: The decoder was killed.
    """
    facts, images = _ask(handle, medium, {"max_pixels": max_pixels, "count": count})
    return [images[at] for at in facts["places"]]


class _Decoder:
    """The process, and the pipe to it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.pipe, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-c", _PROGRAM, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # A signal for the run's group is not for it: a run that saves its state may need one more video.
                start_new_session=True,
            )

    def end(self) -> int:
        """Ends it and returns its exit status."""
        self.pipe.close()
        try:
            return self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


_own = threading.local()


def _decoder() -> _Decoder:
    found: _Decoder | None = getattr(_own, "decoder", None)
    if found is not None and found.owner == os.getpid():
        return found
    if found is not None:
        # A fork has it from its parent, who goes on with it.
        found.pipe.close()
    _own.decoder = _Decoder()
    return _own.decoder


def _ask(handle: IO[bytes], medium: Medium, asked: Mapping[str, Any]) -> tuple[dict[str, Any], list[Image.Image]]:
    check_pyav(medium)
    known = {name: getattr(medium, name) for name in ("path", *_FACTS)}
    decoder = _decoder()
    try:
        return _exchange(decoder, handle, {**asked, "medium": known, "least_seconds": LEAST_SECONDS})
    except MediaRefused:
        raise
    except (EOFError, OSError, ValueError, LookupError, TypeError) as error:
        _own.decoder = None
        raise _why(decoder.end(), medium) from error
    except BaseException:
        # Its answer was not read to the end.
        _own.decoder = None
        decoder.process.kill()
        decoder.end()
        raise


def _exchange(
    decoder: _Decoder, handle: IO[bytes], question: dict[str, Any]
) -> tuple[dict[str, Any], list[Image.Image]]:
    from PIL import Image

    with _real_file(handle) as file:
        decoder.pipe.send_bytes(json.dumps(question).encode())
        send_handle(decoder.pipe, file.fileno(), decoder.process.pid)
        answer = json.loads(decoder.pipe.recv_bytes(_MOST_JSON))
    if "refused" in answer:
        raise MediaRefused(*answer["refused"])
    images = []
    for width, height in answer.get("sizes", ()):
        if not 0 < width * height <= question["max_pixels"]:
            raise ValueError("a frame is larger than it may be")
        images.append(Image.frombytes("RGB", (width, height), decoder.pipe.recv_bytes(3 * width * height)))
    return answer, images


@contextmanager
def _real_file(handle: IO[bytes]) -> Iterator[IO[bytes]]:
    """Yields the file, or one with the same bytes where they are embedded."""
    if not isinstance(handle, io.BytesIO):
        yield handle
        return
    with tempfile.TemporaryFile() as copy:
        copy.write(handle.getbuffer())
        copy.seek(0)
        yield copy


def _why(status: int, medium: Medium) -> MmtuneError:
    if status == -signal.SIGALRM:
        most = LEAST_SECONDS + 2 * medium.seconds
        return MediaRefused("decode_timeout", f"{medium.named} was not decoded after {most:.0f} s")
    if status in (-signal.SIGKILL, -signal.SIGTERM):
        return ResourceError(
            f"the process that decodes {medium.named} was killed, most likely for want of memory",
            "free some memory and run the same command again",
            "worker_died",
        )
    if status > 0:
        return ResourceError(
            "the process that decodes videos ended by itself", "run: mmtune doctor; its last words are above"
        )
    return MediaRefused("decode_error", f"{medium.named} makes its decoder crash")


def serve() -> None:
    """Answers questions until nobody can ask any more; the main function of the process."""
    ignore_stops()
    # The kernel ends the process when its time is over, whatever a decoder does.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    for kind, most in ((resource.RLIMIT_AS, _MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    with Connection(int(sys.argv[1])) as pipe:
        while True:
            try:
                asked = json.loads(pipe.recv_bytes())
                file = os.fdopen(recv_handle(pipe), "rb")
            except EOFError:
                return
            with file:
                _answer(pipe, asked, file)


def _answer(pipe: Connection, asked: dict[str, Any], file: IO[bytes]) -> None:
    medium = Medium("video", **asked["medium"])
    images: Sequence[Image.Image] = ()
    begin = partial(_give_time, asked["least_seconds"])
    try:
        if "count" in asked:
            begin(medium.seconds)
            frames = decode_frames(file, medium, asked["count"], asked["max_pixels"])
            # A short video repeats frames.
            distinct = {id(frame): frame for frame in frames}
            order = {name: at for at, name in enumerate(distinct)}
            images = list(distinct.values())
            facts = {"places": [order[id(frame)] for frame in frames], "sizes": [image.size for image in images]}
        else:
            begin(0.0)
            limits = {name: asked[name] for name in ("max_pixels", "max_seconds", "decode")}
            probed = probe_video(file, medium, begin=begin, **limits)
            facts = {name: getattr(probed, name) for name in _FACTS}
    except MediaRefused as refused:
        images, facts = (), {"refused": [refused.code, refused.message]}
    except MemoryError:
        most = _MEMORY_BYTES >> 30
        images, facts = (), {"refused": ["decode_error", f"{medium.named} needs more than {most} GiB to be decoded"]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    pipe.send_bytes(json.dumps(facts).encode())
    for image in images:
        pipe.send_bytes(image.tobytes())


def _give_time(least_seconds: float, video_seconds: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, least_seconds + 2 * max(0.0, video_seconds))
