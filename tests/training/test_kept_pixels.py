"""Processed images on disk stand for the files: the same tensors in every family that joins images."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmtune.encoding.collate import Collator
from mmtune.errors import IntegrityError
from mmtune.features.levels import read_values
from mmtune.features.shards import Item, read_members
from mmtune.media.probe import ProbeLimits, probe_medium
from mmtune.records import Medium, Message, TextPart
from mmtune.training.frozen_features import DistinctMedia, Shelf, distinct_media
from mmtune.training.kept_pixels import PixelMaker, fill, first_that_fit

SIZES = ((60, 40), (33, 90), (200, 30), (60, 40))
JOINED = ["llava", "llava_bytes", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2_5_omni", "internvl", "gemma3"]


@pytest.fixture
def files(tmp_path: Path) -> list[Medium]:
    """Photos and, where PyAV is there, a video."""
    for at, (width, height) in enumerate(SIZES):
        noise = np.random.default_rng(at).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{at}.jpg", quality=95)
    media = [Medium("image", f"{at}.jpg") for at in range(len(SIZES))]
    return [probe_medium(tmp_path, medium, ProbeLimits()) for medium in [*media, *video(tmp_path)]]


def video(folder: Path) -> list[Medium]:
    av = pytest.importorskip("av")
    with av.open(folder / "clip.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        for at in range(12):
            picture = np.full((48, 64, 3), 20 * at, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return [Medium("video", "clip.mp4")]


def rows_of(family: Any, media: list[Medium]) -> list[Any]:
    asked = [Message("user", (medium, TextPart("What is it?"))) for medium in media]
    return [family.renderer.encode([one, Message("assistant", (TextPart("a cat"),))]) for one in asked]


def pictures_of(rows: list[Any], token: int) -> DistinctMedia:
    found = []
    for row in rows:
        for span in row.media:
            count = int((row.input_ids[span.start : span.start + span.length] == token).sum())
            found.append((Item(span.medium, span.frame, span.frames), count, 1))
    return distinct_media(found)


@pytest.fixture
def opened(monkeypatch: Any) -> list[str]:
    import mmtune.media.load as load

    found: list[str] = []
    for name in ("load_image", "load_video_frames"):
        real = getattr(load, name)

        def counted(root: Any, medium: Medium, *rest: Any, real: Any = real) -> Any:
            found.append(medium.path)
            return real(root, medium, *rest)

        monkeypatch.setattr(load, name, counted)
    return found


def shelved(family: Any, media: list[Medium], root: Path, workers: int = 0) -> SimpleNamespace:
    rows = rows_of(family, media)
    collate = Collator(family.processor, media_root=root)
    pictures = pictures_of(rows, collate.token_id("image") or 0)
    maker = PixelMaker(collate, root)
    each = maker.size_bytes(pictures.items[0], pictures.tokens[0]) / pictures.tokens[0]
    shelf = Shelf(pictures, root / "shelf", "me", each, root, shard_bytes=1)
    fill(shelf, maker, shelf.missing(), workers, lambda count: None)
    return SimpleNamespace(rows=rows, shelf=shelf, collate=collate, maker=maker, pictures=pictures)


@pytest.mark.parametrize("name", JOINED)
def test_batches_are_the_same_and_no_file_is_opened(
    name: str, tiny_family: Any, files: list[Medium], tmp_path: Path, opened: list[str]
) -> None:
    family = tiny_family(name)
    made = shelved(family, files, tmp_path)
    expected = Collator(family.processor, media_root=tmp_path)(made.rows)
    assert made.collate.joins_images
    opened.clear()
    found = Collator(family.processor, media_root=tmp_path).with_pixels(made.shelf.features(read_values))(made.rows)
    assert opened == []
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def test_a_shard_is_small_and_a_video_is_decoded_once_for_it(
    tiny_family: Any, files: list[Medium], tmp_path: Path, opened: list[str]
) -> None:
    rows = rows_of(tiny_family("qwen2_vl"), files[-1:])
    collate = Collator(tiny_family("qwen2_vl").processor, media_root=tmp_path)
    pictures = pictures_of(rows, collate.token_id("image") or 0)
    assert len(pictures.items) == 8
    _, tensors = PixelMaker(collate, tmp_path).make(pictures.items, pictures.tokens)
    assert opened == ["clip.mp4"] and tensors["pixel_values"].dtype == torch.uint8
    with pytest.raises(ValueError, match="another number of tokens"):
        PixelMaker(collate, tmp_path).make(pictures.items[:1], [pictures.tokens[0] + 1])


def test_loader_processes_fill_the_same_shards(tiny_family: Any, files: list[Medium], tmp_path: Path) -> None:
    family = tiny_family("internvl")
    made = shelved(family, files, tmp_path)
    names = sorted(path.name for path in made.shelf.folder.iterdir())
    again = replace(made.shelf, folder=tmp_path / "other")
    counted: list[int] = []
    fill(again, made.maker, again.missing(), 2, counted.append)
    assert sorted(path.name for path in again.folder.iterdir()) == names and len(names) > 3
    for name in names:
        first, second = made.shelf.folder / name, again.folder / name
        assert read_members(first, "me") == read_members(second, "me") and read_members(first, "me")
        assert load_file(first)["pixel_values"].equal(load_file(second)["pixel_values"])
    assert sum(counted) == len(made.pictures.items)


def test_a_changed_file_is_processed_again(tiny_family: Any, files: list[Medium], tmp_path: Path) -> None:
    family = tiny_family("llava")
    made = shelved(family, files[:3], tmp_path)
    assert made.shelf.missing() == {}
    os.utime(tmp_path / "1.jpg", (1, 1))
    assert made.shelf.missing() == {}
    other = Image.fromarray(np.full((90, 33, 3), 7, np.uint8))
    other.save(tmp_path / "1.jpg")
    (number,) = made.shelf.missing()
    fill(made.shelf, made.maker, made.shelf.missing(), 0, lambda count: None)
    pixels = made.shelf.features(read_values)
    fresh = Collator(family.processor, media_root=tmp_path)(made.rows)["pixel_values"]
    assert torch.equal(pixels[made.pictures.items[number]]["pixel_values"], fresh[number : number + 1])


def test_images_that_are_not_there_are_decoded(
    tiny_family: Any, files: list[Medium], tmp_path: Path, opened: list[str]
) -> None:
    family = tiny_family("qwen2_vl")
    made = shelved(family, files[:3], tmp_path)
    part = replace(made.shelf, media=DistinctMedia(made.pictures.items[:2], made.pictures.tokens[:2], 2, 2))
    collate = Collator(family.processor, media_root=tmp_path).with_pixels(part.features(read_values))
    opened.clear()
    found = collate(made.rows)
    assert opened == ["2.jpg"]
    assert torch.equal(
        found["pixel_values"], Collator(family.processor, media_root=tmp_path)(made.rows)["pixel_values"]
    )
    assert first_that_fit([4, 4, 8], 2.5, 39) == 2 and first_that_fit([4, 4, 8], 2.5, 40) == 3
    assert first_that_fit([4], 2.5, 9) == 0


def test_tokens_are_compared_as_for_files(tiny_family: Any, files: list[Medium], tmp_path: Path) -> None:
    family = tiny_family("qwen2_vl")
    made = shelved(family, files[:1], tmp_path)
    row = rows_of(family, [replace(files[0], width=300, height=300)])
    with pytest.raises(IntegrityError, match=r"0\.jpg takes"):
        Collator(family.processor, media_root=tmp_path).with_pixels(made.shelf.features(read_values))(row)
