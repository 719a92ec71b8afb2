import io
import wave
from pathlib import Path

import numpy as np
import pytest

from mmtune.errors import CapabilityError
from mmtune.media import audio, video
from mmtune.media.audio import resample
from mmtune.media.load import load_audio, load_video_frames
from mmtune.media.paths import MediaRefused
from mmtune.media.probe import ProbeLimits, probe_medium
from mmtune.media.video import frame_places
from mmtune.records import Medium

signal = pytest.importorskip("scipy.signal")


def tone(seconds: float, rate: int, channels: int = 1, hz: float = 440) -> np.ndarray:
    one = 0.5 * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)
    return np.repeat(one[:, None], channels, 1)


def wav(samples: np.ndarray, rate: int, width: int = 2) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        if width == 1:
            file.writeframes((samples * 127 + 128).astype(np.uint8).tobytes())
        else:
            whole = (samples * (2 ** (8 * width - 1) - 1)).astype("<i4")
            file.writeframes(np.ascontiguousarray(whole[..., None].view(np.uint8)[..., :width]).tobytes())
    return out.getvalue()


def sound(data: bytes) -> Medium:
    return Medium("audio", "", data=data)


def refused(medium: Medium, **limits) -> str:
    with pytest.raises(MediaRefused) as error:
        probe_medium("/", medium, ProbeLimits(**limits))
    return error.value.code


@pytest.mark.parametrize("soundfile", [True, False])
def test_a_wav_file_whose_end_is_missing_is_refused(monkeypatch, soundfile: bool):
    monkeypatch.setattr(audio, "has_soundfile", lambda: soundfile)
    whole = wav(tone(0.5, 8000), 8000)
    assert probe_medium("/", sound(whole), ProbeLimits()).frames == 4000
    # Behind the samples a chunk of notes may stand.
    assert probe_medium("/", sound(whole + b"LIST\x04\0\0\0INFO"), ProbeLimits()).frames == 4000
    for left in (1, 956, 7999):
        for decode in (True, False):
            assert refused(sound(whole[: 44 + left]), decode=decode) == "decode_error"
        with pytest.raises(MediaRefused, match=f"its header tells 8,044 bytes, {44 + left:,} are there"):
            load_audio("/", sound(whole[: 44 + left]), 8000)


def encoded(container: str, codec: str, rate: int, **options: str) -> bytes:
    av = pytest.importorskip("av")
    out = io.BytesIO()
    noise = np.random.default_rng(0).normal(0, 0.1, (1, 6 * rate)).astype(np.float32)
    if container == "ogg":
        pytest.importorskip("soundfile").write(out, noise[0], rate, format="OGG", subtype="VORBIS")
        return out.getvalue()
    with av.open(out, "w", format=container, options=options) as file:
        stream = file.add_stream(codec, rate=rate)
        if codec in ("libmp3lame", "pcm_s16be"):
            whole = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
            whole.sample_rate = rate
            resampler = av.AudioResampler(stream.format, stream.layout, rate, stream.codec_context.frame_size or 1024)
            frames = [*resampler.resample(whole), *resampler.resample(None)]
        else:
            stream.width = stream.height = 64
            pixels = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), dtype=np.uint8)
            frames = [av.VideoFrame.from_ndarray(one, format="rgb24") for one in pixels]
        for frame in [*frames, None]:
            file.mux(stream.encode(frame))
    return out.getvalue()


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize(
    ("modality", "container", "codec", "options"),
    [
        ("audio", "mp3", "libmp3lame", {}),
        ("audio", "mp3", "libmp3lame", {"id3v2_version": "0"}),
        ("audio", "ogg", "vorbis", {}),
        ("audio", "aiff", "pcm_s16be", {}),
        ("video", "mp4", "mpeg4", {}),
        ("video", "mp4", "mpeg4", {"movflags": "frag_keyframe+empty_moov"}),
        ("video", "matroska", "mpeg4", {}),
        ("video", "webm", "libvpx", {}),
        ("video", "avi", "mpeg4", {}),
    ],
)
def test_a_file_whose_end_is_missing_is_refused(modality: str, container: str, codec: str, options, decode: bool):
    whole = encoded(container, codec, 24 if modality == "video" else 16000, **options)
    found = probe_medium("/", Medium(modality, "", data=whole), ProbeLimits(decode=decode))
    assert found.seconds == pytest.approx(20 / 24 if modality == "video" else 6, rel=0.2)
    for left in (0.3, 0.5, 0.9):
        cut = Medium(modality, "", data=whole[: int(len(whole) * left)])
        assert refused(cut, decode=decode) == "decode_error"


@pytest.mark.parametrize(("container", "codec"), [("mp3", "libmp3lame"), ("matroska", "mpeg4"), ("webm", "libvpx")])
def test_a_file_that_tells_no_length_is_taken_as_it_is(container: str, codec: str):
    options = {"write_xing": "0"} if container == "mp3" else {"live": "1"}
    whole = encoded(container, codec, 24 if codec != "libmp3lame" else 16000, **options)
    medium = Medium("audio" if container == "mp3" else "video", "", data=whole[: len(whole) * 3 // 4])
    assert probe_medium("/", medium, ProbeLimits()).frames > 0
    # A tag behind the last frame is not counted by the header.
    tagged = encoded("mp3", "libmp3lame", 16000) + b"TAG" + bytes(125)
    assert probe_medium("/", sound(tagged), ProbeLimits()).frames == pytest.approx(96000, rel=0.05)


def test_a_wav_file_written_to_a_pipe_has_no_length_in_its_header():
    whole = wav(tone(0.5, 8000), 8000)
    for unknown in (b"\xff\xff\xff\xff", b"\x00\xf0\xff\x7f"):
        assert probe_medium("/", sound(whole[:40] + unknown + whole[44:]), ProbeLimits()).frames == 4000


@pytest.mark.parametrize(
    ("rate", "wanted"), [(8000, 16000), (44100, 16000), (16000, 8000), (48000, 16000), (22050, 24000)]
)
def test_resampling_equals_scipy(rate: int, wanted: int):
    rng = np.random.default_rng(0)
    for length in (1, 7, 1000, 40_001):
        samples = rng.standard_normal(length).astype(np.float32)
        divisor = np.gcd(rate, wanted)
        expected = signal.resample_poly(samples.astype(np.float64), wanted // divisor, rate // divisor)
        got = resample(samples, rate, wanted)
        assert got.dtype == np.float32 and got.shape == expected.shape
        np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("reader", ["soundfile", "wave"])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2, 8])
def test_wav_in_every_width(reader: str, width: int, channels: int, monkeypatch):
    if reader == "wave":
        monkeypatch.setattr(audio, "has_soundfile", lambda: False)
    samples = tone(0.25, 8000, channels)
    data = wav(samples, 8000, width)
    for decode in (True, False):
        found = probe_medium("/", sound(data), ProbeLimits(decode=decode))
        assert (found.frames, found.sample_rate_hz, found.seconds) == (2000, 8000, 0.25)
    got = load_audio("/", sound(data), 8000)
    assert got.shape == (2000,) and got.dtype == np.float32
    np.testing.assert_allclose(got, samples[:, 0], atol=0.02 if width == 1 else 1e-4)
    assert load_audio("/", sound(data), 16000).shape == (4000,)


def test_faulty_sounds():
    import soundfile

    def as_float(samples: np.ndarray) -> bytes:
        out = io.BytesIO()
        soundfile.write(out, samples, 8000, format="WAV", subtype="FLOAT")
        return out.getvalue()

    assert refused(sound(wav(np.zeros((0, 1)), 8000))) == "decode_error"
    assert refused(sound(b"")) == "decode_error"
    assert refused(sound(b"<html>")) == "decode_error"
    assert refused(sound(as_float(np.array([0.0, np.nan, 0.1])))) == "bad_samples"
    with pytest.raises(MediaRefused):
        load_audio("/", sound(as_float(np.array([0.0, np.inf]))), 8000)
    assert refused(sound(wav(tone(2, 8000), 8000)), max_audio_seconds=1.5) == "too_long"


def test_compressed_sounds_need_the_extra(monkeypatch):
    monkeypatch.setattr(audio, "has_soundfile", lambda: False)
    with pytest.raises(CapabilityError) as error:
        probe_medium("/", sound(b"fLaC" + b"\0" * 40), ProbeLimits())
    assert error.value.hint == 'pip install "mmtune[audio]"'


def test_video_needs_the_extra(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "v.mp4").write_bytes(b"x")
    with pytest.raises(CapabilityError) as error:
        probe_medium(tmp_path, Medium("video", "v.mp4"), ProbeLimits())
    assert error.value.hint == 'pip install "mmtune[video]"'


def clip(frames: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """A video whose frame k is grey of brightness 10 k."""
    import av

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = size
        for at in range(frames):
            picture = np.full((size[1], size[0], 3), 10 * at, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


@pytest.mark.parametrize("decode", [True, False])
def test_video_header_and_evenly_spaced_frames(decode: bool):
    found = probe_medium("/", Medium("video", "", data=clip(21)), ProbeLimits(decode=decode))
    assert (found.width, found.height, found.frames, found.fps) == (64, 48, 21, 10.0)
    assert abs(found.seconds - 2.1) < 0.11
    frames = load_video_frames("/", found, 5)
    assert [frame.size for frame in frames] == [(64, 48)] * 5
    brightness = [np.asarray(frame).mean() / 10 for frame in frames]
    np.testing.assert_allclose(brightness, [0, 5, 10, 15, 20], atol=1)
    assert len(load_video_frames("/", found, 30)) == 30


def test_frame_places_are_spread_over_the_whole():
    for frames in range(1, 60):
        for count in range(1, 20):
            places = frame_places(frames, count)
            assert len(places) == count and places == sorted(places) and places[0] == 0
            if count > 1:
                assert places[-1] == frames - 1
                exact = np.linspace(0, frames - 1, count)
                assert np.abs(np.array(places) - exact).max() <= 0.5


def test_video_limits():
    medium = Medium("video", "", data=clip(21))
    assert refused(medium, max_video_seconds=1.0) == "too_long"
    assert refused(medium, max_image_pixels=100) == "too_many_pixels"
    assert refused(Medium("video", "", data=b"not a video at all")) == "decode_error"


def test_real_clips(shared_datasets: Path):
    folder = shared_datasets / "video_clips"
    for name in (
        "archery.mp4",
        "arm_wrestling_demo.mp4",
        "mmaction_part_0.mp4",
        "mmaction_test.avi",
        "flipping_a_pancake.mkv",
    ):
        for decode in (True, False):
            found = probe_medium(folder, Medium("video", name), ProbeLimits(decode=decode))
            assert found.frames > 10 and found.fps > 5 and found.seconds > 0.5, name
        assert all(frame.size == (found.width, found.height) for frame in load_video_frames(folder, found, 4))
    with pytest.raises(MediaRefused) as error:
        probe_medium(folder, Medium("video", "corrupted.mp4"), ProbeLimits(decode=True))
    assert error.value.code == "decode_error"


def test_real_sounds(shared_datasets: Path):
    folder = shared_datasets / "llamafactory_demo" / "mllm_demo_data"
    for name in ("1.mp3", "2.wav", "3.flac", "4.mp3"):
        header = probe_medium(folder, Medium("audio", name), ProbeLimits(decode=False))
        found = probe_medium(folder, Medium("audio", name), ProbeLimits(decode=True))
        assert header.frames == found.frames
        assert len(load_audio(folder, found, found.sample_rate_hz)) == found.frames
        assert abs(len(load_audio(folder, found, 16000)) / 16000 - found.seconds) < 0.001
