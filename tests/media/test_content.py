"""Media are the same where their bytes are, whatever they are called; few files are read to know it."""

import pickle
from pathlib import Path

import pytest

from mmtune.media import content
from mmtune.media.content import MediaContents, names_beside
from mmtune.records import Medium


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the files that were read whole."""
    paths: list[str] = []
    plain = content._file_digest
    monkeypatch.setattr(content, "_file_digest", lambda root, one: paths.append(one.path) or plain(root, one))
    return paths


def written(root: Path, **files: bytes) -> dict[str, Medium]:
    root.mkdir(exist_ok=True)
    for name, data in files.items():
        (root / name).write_bytes(data)
    return {name: Medium("image", name) for name in files}


def test_a_copy_has_the_name_of_what_was_learned_also_below_another_root(tmp_path: Path):
    here = written(tmp_path / "here", a=b"cat", b=b"dog", copy=b"cat", longer=b"horse")
    there = written(tmp_path / "there", other=b"cat", b=b"cow")
    made = MediaContents()
    first = made.learn(tmp_path / "here", here["a"])
    assert made.learn(tmp_path / "here", here["copy"]) == first == made.name(tmp_path / "there", there["other"])
    assert first == made.name("/nowhere", Medium("image", "", data=b"cat"))
    others = [made.learn(tmp_path / "here", here["b"]), made.name(tmp_path / "there", there["b"])]
    others += [made.name(tmp_path / "here", here["longer"]), made.name(tmp_path, Medium("image", "gone"))]
    assert len({first, *others}) == 5
    again = pickle.loads(pickle.dumps(made))
    assert again.name(tmp_path / "there", there["other"]) == first


def test_only_files_of_a_learned_size_are_read_and_each_once(tmp_path: Path, read: list[str]):
    files = written(tmp_path, **{f"f{at}": b"x" * at for at in range(1, 40)}, twin=b"y" * 7, copy=b"x" * 7)
    name = names_beside(tmp_path, [files[f"f{at}"] for at in range(1, 20)])
    assert read == []
    for _ in range(3):
        assert len({name(one) for one in files.values()}) == len(files) - 1
    assert sorted(read) == ["copy", "f7", "twin"]


def test_many_files_of_one_size_are_read_once_each(tmp_path: Path, read: list[str]):
    files = written(tmp_path, **{f"f{at}": f"{at % 50:03}".encode() for at in range(150)})
    name = names_beside(tmp_path, files.values())
    assert len({name(one) for one in files.values()}) == 50
    assert sorted(read) == sorted(files)


def test_what_the_rows_say_of_size_and_digest_is_believed(tmp_path: Path, read: list[str]):
    known = [
        Medium("image", name, size_bytes=3, sha256=digest) for name, digest in (("a", "s"), ("b", "s"), ("c", "t"))
    ]
    name = names_beside(tmp_path, known[:1])
    assert [name(one) == name(known[0]) for one in known] == [True, True, False]
    assert read == []
