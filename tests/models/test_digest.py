"""The digest of a model's weights: every byte counts, and a large file is read once as long as nobody touches it."""

import json
import os
from pathlib import Path

import pytest

from mmtune.models import digest
from mmtune.models.digest import weights_digest


def test_a_copy_has_the_same_one_and_a_changed_config_another(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
        (tmp_path / name / "config.json").write_text("{}")
    first = weights_digest(str(tmp_path / "one"))
    assert first == weights_digest(str(tmp_path / "two"))
    (tmp_path / "two" / "config.json").write_text('{"a": 1}')
    assert first != weights_digest(str(tmp_path / "two"))


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A weight file over the limit, of several pieces of several blocks, settled; its kept digests are the test's."""
    for name, value in {"_SMALL": 100, "_PIECE": 64, "_BLOCK": 24, "_SETTLED_SECONDS": -1.0}.items():
        monkeypatch.setattr(digest, name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(bytes(range(200)))
    return file


def found(file):
    return weights_digest(str(file.parent))


def test_every_byte_of_a_large_file_counts(large):
    whole, first = large.read_bytes(), found(large)
    seen = {first}
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        large.write_bytes(changed)
        seen.add(found(large))
    assert len(seen) == len(whole) + 1
    large.write_bytes(whole)
    assert found(large) == first


def test_a_large_file_is_read_once(large, monkeypatch):
    first, read, reads = found(large), digest._piece_digest, []
    monkeypatch.setattr(digest, "_piece_digest", lambda file, start: reads.append(start) or read(file, start))
    assert found(large) == first and not reads
    os.utime(large)
    assert found(large) == first and len(reads) == 4
    moved = large.parent.parent / "moved"
    large.parent.rename(moved)
    assert weights_digest(str(moved)) == first and len(reads) == 8


def test_a_change_that_hides_behind_size_and_time_is_seen(large):
    first, stat = found(large), large.stat()
    with large.open("r+b") as stream:
        stream.seek(150)
        stream.write(b"other")
    os.utime(large, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (large.stat().st_size, large.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert found(large) != first


def test_a_file_that_was_just_written_is_not_remembered(large, tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "_SETTLED_SECONDS", 60.0)
    found(large)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["no json", "no digest", "no folder"])
def test_a_damaged_memory_is_none(large, tmp_path, monkeypatch, damage):
    first = found(large)
    (kept,) = (tmp_path / "cache" / "mmtune" / "weights").iterdir()
    if damage == "no folder":
        # A file stands where the folder should be made.
        monkeypatch.setenv("XDG_CACHE_HOME", str(large))
    else:
        kept.write_text("[1, 2" if damage == "no json" else json.dumps({"stand": []}))
    assert found(large) == first
