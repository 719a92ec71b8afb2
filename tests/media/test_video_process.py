"""What hangs or crashes the decoder is refused by name; frames found by seeking are those of a whole decode."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from mmtune.errors import ResourceError
from mmtune.media import video, video_process
from mmtune.media.load import load_video_frames
from mmtune.media.paths import MediaRefused, open_medium
from mmtune.media.probe import ProbeLimits, probe_medium
from mmtune.media.video_process import probe_apart
from mmtune.records import Medium

av = pytest.importorskip("av")
CLIPS = ("archery.mp4", "arm_wrestling_demo.mp4", "mmaction_part_0.mp4", "mmaction_test.avi", "flipping_a_pancake.mkv")


def clip(frames: int, codec: str = "mpeg4", key_every: int = 12, **options: str) -> bytes:
    """A video of noise; no two frames are the same."""
    out = io.BytesIO()
    rng = np.random.default_rng(0)
    # Noise looks like a cut in every frame, which would make it a key frame.
    options = {"sc_threshold": "1000000000"} | options
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = key_every
        for _ in range(frames):
            picture = np.repeat(np.repeat(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8), 8, 0), 8, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def probed(data: bytes) -> Medium:
    return probe_medium("/", Medium("video", "", data=data), ProbeLimits())


def decoder() -> subprocess.Popen[bytes]:
    return video_process._own.decoder.process


@pytest.fixture(scope="module")
def short() -> Medium:
    return probed(clip(21))


def stuck() -> tuple[io.BufferedReader, int]:
    """A file that never ends, and the descriptor that keeps it open."""
    reading, writing = os.pipe()
    return os.fdopen(reading, "rb"), writing


def refusal(handle: io.BufferedReader) -> Exception:
    with handle, pytest.raises((MediaRefused, ResourceError)) as error:
        probe_apart(handle, Medium("video", "a.mp4"), max_pixels=10**6, max_seconds=60, decode=True)
    return error.value


def test_a_file_that_hangs_is_refused_and_the_next_one_is_read(short: Medium, monkeypatch) -> None:
    monkeypatch.setattr(video_process, "LEAST_SECONDS", 0.5)
    handle, writing = stuck()
    began = time.monotonic()
    error = refusal(handle)
    os.close(writing)
    assert (error.code, error.exit_code) == ("decode_timeout", 3) and "a.mp4" in error.message
    assert time.monotonic() - began < 20
    monkeypatch.undo()
    assert len(load_video_frames("/", short, 3)) == 3


def test_a_slow_video_is_refused_by_its_length(short: Medium, monkeypatch) -> None:
    probed(clip(3))
    monkeypatch.setattr(video_process, "LEAST_SECONDS", 1e-5)
    for name, ask in (
        ("frames", lambda: load_video_frames("/", short_of(0.0), 5)),
        ("probe", lambda: probed(clip(21))),
    ):
        with pytest.raises(MediaRefused) as error:
            ask()
        assert error.value.code == "decode_timeout", name
    # Twice its length is on top.
    assert len(load_video_frames("/", short_of(30.0), 5)) == 5


def short_of(seconds: float) -> Medium:
    return Medium("video", "", data=clip(21), width=64, height=48, frames=21, fps=10, seconds=seconds)


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [(signal.SIGSEGV, MediaRefused, "decode_error"), (signal.SIGKILL, ResourceError, "worker_died")],
)
def test_a_decoder_that_dies_is_no_end_of_the_run(short: Medium, number: int, kind: type, code: str) -> None:
    probed(short.data or b"")
    handle, writing = stuck()
    threading.Timer(0.3, decoder().send_signal, (number,)).start()
    error = refusal(handle)
    os.close(writing)
    assert type(error) is kind and error.code == code
    assert len(load_video_frames("/", short, 3)) == 3


def test_one_process_answers_all_questions_of_a_thread(short: Medium) -> None:
    first = decoder().pid
    for at in (3, 5, 30):
        assert len(load_video_frames("/", short, at)) == at
    with pytest.raises(MediaRefused, match="not a video"):
        probed(b"not a video at all")
    assert decoder().pid == first
    found = []
    other = threading.Thread(target=lambda: found.append((len(load_video_frames("/", short, 4)), decoder().pid)))
    other.start()
    other.join()
    assert found[0][0] == 4 and found[0][1] != first


def test_a_fork_has_a_decoder_of_its_own(short: Medium) -> None:
    load_video_frames("/", short, 2)
    first = decoder().pid

    def forked(out) -> None:
        out.put((np.asarray(load_video_frames("/", short, 2)[1]).mean(), decoder().pid))

    context = multiprocessing.get_context("fork")
    out = context.Queue()
    process = context.Process(target=forked, args=(out,))
    process.start()
    mean, own = out.get(timeout=60)
    process.join()
    assert own != first and mean == np.asarray(load_video_frames("/", short, 2)[1]).mean() and decoder().pid == first


def test_no_process_is_left_when_the_asking_one_is_killed(short: Medium, tmp_path: Path, repository: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(short.data or b"")
    program = (
        "import sys, time; from mmtune.media import video_process as v; from mmtune.media.probe import *;"
        "from mmtune.records import Medium; probe_medium(sys.argv[1], Medium('video', 'a.mp4'), ProbeLimits());"
        "print(v._own.decoder.process.pid, flush=True); time.sleep(60)"
    )
    asking = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, cwd=repository)
    assert asking.stdout is not None
    own = psutil.Process(int(asking.stdout.readline()))
    # A signal for the group of the run does not reach it.
    own.terminate()
    assert own.is_running() and os.getpgid(own.pid) != os.getpgid(asking.pid)
    asking.kill()
    asking.wait()
    asking.stdout.close()
    psutil.wait_procs([own], timeout=20)
    assert not own.is_running()


def test_a_frame_larger_than_allowed_is_not_taken(short: Medium, monkeypatch) -> None:
    class Lying:
        def send_bytes(self, data: bytes) -> None: ...

        def recv_bytes(self, most: int) -> bytes:
            return b'{"sizes": [[100000, 100000]], "places": [0]}'

    load_video_frames("/", short, 2)
    monkeypatch.setattr(video_process, "send_handle", lambda *given: None)
    with pytest.raises(ValueError, match="larger"):
        monkeypatch.setattr(video_process._own.decoder, "pipe", Lying())
        handle, _ = open_medium("/", short)
        video_process._exchange(video_process._own.decoder, handle, {"max_pixels": 10**6})


def frames_of(medium: Medium, root: Path | str, count: int) -> tuple[list[np.ndarray], str]:
    """Frames, decoded in this process, and how: ``seek`` or ``whole``."""
    how = []
    original = video._from_the_start

    def from_the_start(*given):
        how.append("whole")
        return original(*given)

    handle, _ = open_medium(root, medium)
    with handle, pytest.MonkeyPatch.context() as patch:
        patch.setattr(video, "_from_the_start", from_the_start)
        found = video.decode_frames(handle, medium, count, 10**8)
    return [np.asarray(frame) for frame in found], (how or ["seek"])[0]


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("mpeg4", {}),
        ("mpeg4", {"bf": "2"}),
        ("libx264", {"bf": "3"}),
        ("libx264", {"bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    ],
    ids=["mpeg4", "mpeg4 with B frames", "h264 with B frames", "h264 open gop"],
)
def test_seeking_gives_the_frames_of_a_whole_decode(codec: str, options: dict[str, str], monkeypatch) -> None:
    medium = probed(clip(400, codec, **options))
    assert medium.frames == 400
    with av.open(io.BytesIO(medium.data)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert 20 < sum(packet.is_keyframe for packet in packets) < 80
    assert ("bf" in options and options["bf"] != "0") == any(packet.pts != packet.dts for packet in packets)
    for count in (2, 5, 9):
        found, how = frames_of(medium, "/", count)
        assert how == "seek"
        with monkeypatch.context() as patch:
            patch.setattr(video, "_SEEK_BEYOND_FRAMES", 10**9)
            expected, how = frames_of(medium, "/", count)
        assert how == "whole" and all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))


def test_few_key_frames_or_a_wrong_count_mean_a_whole_decode(monkeypatch) -> None:
    monkeypatch.setattr(video, "_SEEK_BEYOND_FRAMES", 10)
    assert frames_of(probed(clip(60, key_every=60)), "/", 5)[1] == "whole"
    medium = probed(clip(60, key_every=4))
    assert frames_of(medium, "/", 3)[1] == "seek"
    assert frames_of(replace(medium, frames=61), "/", 3)[1] == "whole"


def test_real_clips_give_the_same_frames_by_seeking(shared_datasets: Path, monkeypatch) -> None:
    folder, ways = shared_datasets / "video_clips", []
    for name in CLIPS:
        medium = probe_medium(folder, Medium("video", name), ProbeLimits())
        for count in (2, 3, 8):
            expected, _ = frames_of(medium, folder, count)
            with monkeypatch.context() as patch:
                patch.setattr(video, "_SEEK_BEYOND_FRAMES", 1)
                found, how = frames_of(medium, folder, count)
            ways.append(how)
            assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True)), name
    assert "seek" in ways
