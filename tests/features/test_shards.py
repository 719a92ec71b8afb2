"""Shards are complete or absent, name what they hold, and notice a file that changed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmtune import files
from mmtune.errors import IntegrityError
from mmtune.features import shards
from mmtune.features.shards import (
    Features,
    Item,
    Member,
    cut,
    is_fresh,
    is_whole,
    item_name,
    read_members,
    shard_path,
    stand_of,
    write_shard,
)
from mmtune.records import Medium


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(name.encode() * 50)
    pictures = [Item(Medium("image", path=f"{name}.png")) for name in "abc"]
    return [*pictures, Item(Medium("video", path="c.png"), frame=1, frames=4)]


def write(folder: Path, root: Path, items: list[Item], source: str = "me") -> torch.Tensor:
    rows = torch.arange(len(items) * 6, dtype=torch.float32).reshape(-1, 3)
    members = [Member(item_name(item), *stand_of(item, root), 2 * k, 2, 7, (1, k, 2)) for k, item in enumerate(items)]
    write_shard(shard_path(folder, 0), source, members, {"image_features": rows, "deep": -rows})
    return rows


def test_what_is_written_comes_back(tmp_path: Path, items: list[Item]) -> None:
    rows = write(tmp_path / "f", tmp_path, items)
    found = Features([shard_path(tmp_path / "f", 0)], "me")
    for k, item in enumerate(items):
        one = found[item]
        assert torch.equal(one["image_features"], rows[2 * k : 2 * k + 2]) and found.tokens(item) == 7
        assert torch.equal(one["deep"], -one["image_features"])
        assert one["image_grid_thw"].tolist() == [[1, k, 2]]
    with pytest.raises(KeyError):
        found[Item(Medium("image", path="other.png"))]
    assert not list((tmp_path / "f").glob(".*"))


def test_a_shard_is_fresh_until_a_file_or_the_wish_changes(tmp_path: Path, items: list[Item]) -> None:
    write(tmp_path / "f", tmp_path, items)
    path = shard_path(tmp_path / "f", 0)
    members = read_members(path, "me")
    assert is_fresh(members, items, tmp_path)
    assert not is_fresh(members, items[:-1], tmp_path) and not is_fresh(members, items[::-1], tmp_path)
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert is_fresh(members, items, tmp_path), "another time, the same bytes"
    (tmp_path / "a.png").write_bytes(b"A" * 50)
    assert not is_fresh(members, items, tmp_path)
    (tmp_path / "a.png").unlink()
    assert not is_fresh(members, items, tmp_path)


def test_another_source_or_a_damaged_file_is_no_shard(tmp_path: Path, items: list[Item]) -> None:
    write(tmp_path / "f", tmp_path, items)
    path = shard_path(tmp_path / "f", 0)
    assert read_members(path, "another model") is None
    path.write_bytes(path.read_bytes()[:40])
    assert read_members(path, "me") is None
    assert read_members(shard_path(tmp_path / "f", 1), "me") is None
    assert not is_fresh(None, items, tmp_path)
    with pytest.raises(IntegrityError, match="cannot be read"):
        Features([path], "me")


def test_one_bit_anywhere_is_found(tmp_path: Path, items: list[Item]) -> None:
    write(tmp_path / "f", tmp_path, items)
    path = shard_path(tmp_path / "f", 0)
    whole = path.read_bytes()
    assert is_whole(path)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert not (read_members(path, "me") and is_whole(path)), whole[max(place - 20, 0) : place + 20]


def test_a_shard_that_is_made_again_has_the_same_bytes(tmp_path: Path, items: list[Item]) -> None:
    made = set()
    for _ in range(6):
        write(tmp_path / "f", tmp_path, items)
        made.add(shard_path(tmp_path / "f", 0).read_bytes())
    assert len(made) == 1


def test_a_shard_written_anew_is_read_anew(tmp_path: Path, items: list[Item]) -> None:
    rows = write(tmp_path / "f", tmp_path, items)
    path = shard_path(tmp_path / "f", 0)
    assert torch.equal(Features([path], "me")[items[0]]["image_features"], rows[:2])
    write(tmp_path / "f", tmp_path, items[::-1])
    assert torch.equal(Features([path], "me")[items[-1]]["image_features"], rows[:2])


def test_a_failed_write_leaves_nothing(tmp_path: Path, items: list[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "f", tmp_path, items)
    assert not list((tmp_path / "f").iterdir())


def test_a_name_tells_frames_apart(items: list[Item]) -> None:
    names = [item_name(item) for item in items]
    assert len(set(names)) == len(names)
    assert item_name(replace(items[0], medium=replace(items[0].medium, width=9))) == names[0]


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 2000))
def test_shards_hold_every_item_once_and_stay_small(lengths: list[int], row_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 10_000)
        found = cut(lengths, row_bytes)
    assert [index for own in found for index in own] == list(range(len(lengths)))
    for own in found:
        assert len(own) == 1 or sum(lengths[index] for index in own) * row_bytes <= 10_000
