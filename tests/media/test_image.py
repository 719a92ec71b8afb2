import io
import re
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmtune.media.load import load_image
from mmtune.media.paths import MediaRefused
from mmtune.media.probe import ProbeLimits, probe_medium
from mmtune.records import Medium


def picture(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def probe(data: bytes, **limits) -> Medium:
    return probe_medium("/", Medium("image", "", data=data), ProbeLimits(**limits))


def refused(data: bytes, **limits) -> str:
    with pytest.raises(MediaRefused) as error:
        probe(data, **limits)
    assert not re.search(r"\b0x[0-9a-f]{4}", error.value.message)
    return error.value.code


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_formats(format: str, decode: bool):
    data = encoded(picture(), format)
    found = probe(data, decode=decode)
    assert (found.width, found.height, found.frames, found.size_bytes) == (64, 48, 1, len(data))


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_probe_and_load_agree_on_rotation(orientation: int, decode: bool):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ("JPEG", "PNG", "WEBP"):
        data = encoded(picture(), format, exif=exif)
        found = probe(data, decode=decode)
        loaded = load_image("/", found)
        assert loaded.size == (found.width, found.height) == ((48, 64) if orientation >= 5 else (64, 48))
        from PIL import ImageOps

        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        assert np.array_equal(np.asarray(loaded), np.asarray(expected))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.95])
def test_a_cut_file_is_refused(format: str, share: float):
    data = encoded(picture(320, 240), format)
    assert refused(data[: int(len(data) * share)], decode=True) == "decode_error"


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_the_header_probe_sees_a_missing_end(format: str):
    data = encoded(picture(320, 240), format)
    assert refused(data[: len(data) // 2], decode=False) == "decode_error"
    assert probe(data + b"\0" * 300, decode=False).width == 320


def test_a_flipped_byte_in_png_is_refused():
    data = bytearray(encoded(picture(320, 240), "PNG"))
    data[len(data) // 2] ^= 0xFF
    assert refused(bytes(data)) == "decode_error"


def test_an_image_without_a_path_is_called_what_it_is():
    with pytest.raises(MediaRefused, match=r"^the embedded image is empty$"):
        probe(b"")


def test_what_is_no_image():
    assert refused(b"") == "decode_error"
    assert refused(b"<!DOCTYPE html><html>not found</html>") == "decode_error"
    assert refused(encoded(picture(), "TIFF")) == "format_not_allowed"
    assert refused(b"<svg xmlns='http://www.w3.org/2000/svg'/>") == "format_not_allowed"
    assert refused(b"%PDF-1.4 ...") == "format_not_allowed"
    assert refused(b"8BPS" + b"\0" * 40) == "format_not_allowed"


def huge_png(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [30_000, 12_000])
@pytest.mark.parametrize("decode", [True, False])
def test_too_many_pixels_are_refused_before_allocation(side: int, decode: bool):
    data = huge_png(side, side)
    tracemalloc.start()
    assert refused(data, decode=decode) == "too_many_pixels"
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "green", "blue")]
    for format in ("GIF", "WEBP"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        assert probe(data).frames == 1
        red = load_image("/", Medium("image", "", data=data)).getpixel((3, 3))
        assert red[0] > 240 and max(red[1:]) < 20


def test_modes_become_rgb():
    def load(image: Image.Image, format: str = "PNG", **options) -> Image.Image:
        return load_image("/", Medium("image", "", data=encoded(image, format, **options)))

    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert load(half).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    assert load(palette).getpixel((0, 0)) == (0, 0, 255)
    assert load(palette, transparency=1).getpixel((0, 0)) == (255, 255, 255)
    grey16 = Image.fromarray(np.full((4, 4), 0x8040, np.uint16))
    assert load(grey16).getpixel((0, 0)) == (0x80, 0x80, 0x80)
    assert load(Image.new("LA", (4, 4), (0, 255))).getpixel((0, 0)) == (0, 0, 0)
    assert load(Image.new("1", (4, 4), 1)).getpixel((0, 0)) == (255, 255, 255)
    cmyk = load(picture().convert("CMYK"), "JPEG", quality=95)
    assert np.abs(np.asarray(cmyk, int) - np.asarray(picture(), int)).mean() < 8
    for size in ((1, 1), (1, 20_000)):
        assert load(Image.new("RGB", size)).size == size


def test_broken_exif_is_no_rotation():
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert (probe(data).width, load_image("/", Medium("image", "", data=data)).width) == (64, 64)


def test_content_decides_not_the_name(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(encoded(picture(), "PNG"))
    found = probe_medium(tmp_path, Medium("image", "a.jpg"), ProbeLimits(hash_bytes=True, embed=True))
    assert found.width == 64 and len(found.sha256) == 64 and found.data == (tmp_path / "a.jpg").read_bytes()


def test_real_images(shared_datasets: Path):
    folder = shared_datasets / "opencqa"
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert len(names) == 110
    for name in names:
        found = probe_medium(folder, Medium("image", name), ProbeLimits())
        assert load_image(folder, found).size == (found.width, found.height)
