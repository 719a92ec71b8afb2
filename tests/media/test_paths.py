import io
import os
import pickle
import sys
from pathlib import Path

import pytest

from mmtune.media.paths import MediaRefused, listing, open_medium, resolve
from mmtune.records import Medium


def refused(root: Path, path: str) -> str:
    with pytest.raises(MediaRefused) as error:
        open_medium(root, Medium("image", path))
    assert error.value.exit_code == 3
    return error.value.code


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.jpg").write_bytes(b"abc")
    return folder


def test_what_lies_below_is_opened(root: Path):
    (root / "sub" / "inner.jpg").symlink_to("a.jpg")
    (root / "folder").symlink_to(root / "sub")
    for path in ("sub/a.jpg", "./sub/a.jpg", "sub//a.jpg", "sub/inner.jpg", "folder/a.jpg", "folder/inner.jpg"):
        handle, size = open_medium(root, Medium("image", path))
        with handle:
            assert handle.read() == b"abc" and size == 3, path
    handle, size = open_medium(root, Medium("image", "", data=b"xy"))
    assert isinstance(handle, io.BytesIO) and size == 2


def test_a_linked_root_is_a_root(root: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(root)
    assert resolve(tmp_path / "link", "sub/a.jpg") == str(root / "sub" / "a.jpg")


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("../secret.txt", "path_escape"),
        ("sub/../../secret.txt", "path_escape"),
        ("sub\\..\\..\\secret.txt", "path_escape"),
        ("/etc/passwd", "path_escape"),
        ("~/x", "path_escape"),
        ("C:\\x.jpg", "path_escape"),
        ("c:/x.jpg", "path_escape"),
        ("\\\\host\\share", "path_escape"),
        ("file:///etc/passwd", "path_escape"),
        ("file:x", "path_escape"),
        ("http://169.254.169.254/latest", "url_refused"),
        ("https://example.com/a.jpg", "url_refused"),
        ("s3://bucket/a.jpg", "url_refused"),
        ("a\0b", "bad_path"),
        ("", "bad_path"),
        ("x" * 5000, "bad_path"),
        ("gone.jpg", "media_missing"),
        ("gone/a.jpg", "media_missing"),
        ("sub/a.jpg/b", "bad_path"),
        ("sub", "not_regular_file"),
        (".", "not_regular_file"),
    ],
)
def test_refused_paths(root: Path, path: str, code: str):
    assert refused(root, path) == code


def test_links_that_leave_the_root(root: Path):
    (root / "sub" / "out.jpg").symlink_to("../../secret.txt")
    (root / "sub" / "up").symlink_to("../..")
    (root / "loop.jpg").symlink_to("loop.jpg")
    assert refused(root, "sub/out.jpg") == "path_escape"
    assert refused(root, "sub/up/secret.txt") == "path_escape"
    assert refused(root, "loop.jpg") == "bad_path"


@pytest.mark.timeout(5)
def test_pipes_and_devices_do_not_hang(root: Path):
    os.mkfifo(root / "pipe.jpg")
    assert refused(root, "pipe.jpg") == "not_regular_file"
    (root / "zero.jpg").symlink_to("/dev/zero")
    assert refused(root, "zero.jpg") == "path_escape"


def test_nothing_outside_is_opened(root: Path):
    (root / "sub" / "out.jpg").symlink_to("../../secret.txt")
    (root / "sub" / "up").symlink_to("../..")
    opened: list[str] = []
    watching = [True]
    sys.addaudithook(
        lambda event, args: opened.append(str(args[0])) if watching[0] and event in ("open", "socket.connect") else None
    )
    for path in ("../secret.txt", "/etc/passwd", "sub/out.jpg", "sub/up/secret.txt", "http://localhost/x"):
        refused(root, path)
    watching[0] = False
    assert opened == []


def test_a_refusal_survives_a_process_border():
    again = pickle.loads(pickle.dumps(MediaRefused("decode_error", "broken")))
    assert (again.code, again.message, bool(again.hint)) == ("decode_error", "broken", True)


def test_listing_notices_sizes_and_skips_the_run(root: Path):
    (root / "run").mkdir()
    (root / "run" / "x").write_text("1")
    assert list(listing(root, root / "run")) == ["sub/a.jpg:3"]
