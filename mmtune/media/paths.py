"""Media paths from data nobody checked: opened only inside their root, only regular files."""

from __future__ import annotations

import functools
import io
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mmtune.errors import DataError
from mmtune.records import Medium

_DRIVE = re.compile(r"^[A-Za-z]:")
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")


class MediaRefused(DataError):
    """A medium that is not used; ``code`` is the reason (``media_missing``, ``path_escape``...)."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(
            detail,
            "put the file back or mend it; build-data with `build.verify: decode` refuses such rows and lists them",
            reason,
        )

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.code, self.message)


@functools.lru_cache(maxsize=256)
def _real_root(root: str) -> str:
    return os.path.realpath(root)


def check_relative(path: str) -> None:
    """Raises MediaRefused unless a path is relative and stays below where it starts."""
    if not path or "\0" in path:
        raise MediaRefused("bad_path", f"{path!r} is no file name")
    scheme = _SCHEME.match(path)
    if scheme and scheme.group(1).lower() != "file":
        raise MediaRefused("url_refused", f"{path!r} is an address; only files below the media root are read")
    if scheme or path.startswith(("/", "\\", "~", "file:")) or _DRIVE.match(path):
        raise MediaRefused("path_escape", f"{path!r} is not relative to the media root")
    if ".." in re.split(r"[/\\]", path):
        raise MediaRefused("path_escape", f"{path!r} leaves the media root")


def resolve(root: Path | str, path: str) -> str:
    """Returns the real absolute path of a medium below its root.

    Raises:
        MediaRefused: ``bad_path``, ``path_escape``, ``url_refused`` or ``media_missing``.
    """
    check_relative(path)
    top = _real_root(str(root))
    folder, _, name = path.rpartition("/")
    try:
        real = f"{_real_folder(top, folder)}/{name}" if name not in ("", ".") else ""
        if not real or os.path.islink(real):  # noqa: PTH114 - called for every row
            real = os.path.realpath(f"{top}/{path}", strict=True)
    except FileNotFoundError as error:
        raise MediaRefused("media_missing", f"there is no {path!r} below {Path(root).name!r}") from error
    except (OSError, ValueError) as error:
        why = os.strerror(error.errno or 0) if isinstance(error, OSError) else "no name of a file"
        raise MediaRefused("bad_path", f"{path!r} cannot be opened: {why}") from error
    if real != top and top != "/" and not real.startswith(top + "/"):
        raise MediaRefused("path_escape", f"{path!r} leads out of the media root")
    return real


@functools.lru_cache(maxsize=4096)
def _real_folder(top: str, folder: str) -> str:
    return os.path.realpath(f"{top}/{folder}", strict=True).rstrip("/")


def open_medium(root: Path | str, medium: Medium) -> tuple[IO[bytes], int]:
    """Returns an open binary handle and the size of a medium, from its bytes or its file.

    Raises:
        MediaRefused: As ``resolve``, or ``not_regular_file``.
    """
    if medium.data is not None:
        return io.BytesIO(medium.data), len(medium.data)
    real = resolve(root, medium.path)
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer; O_NOFOLLOW: the name was real a moment ago.
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except IsADirectoryError as error:
        raise MediaRefused("not_regular_file", f"{medium.path!r} is a folder") from error
    except FileNotFoundError as error:
        raise MediaRefused("media_missing", f"there is no {medium.path!r} below {Path(root).name!r}") from error
    except OSError as error:
        raise MediaRefused("bad_path", f"{medium.path!r} cannot be opened: {os.strerror(error.errno or 0)}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise MediaRefused("not_regular_file", f"{medium.path!r} is no regular file")
    return os.fdopen(descriptor, "rb"), status.st_size


def listing(folder: Path, skip: Path) -> Iterator[str]:
    """Yields ``path:size`` of every file below a folder in sorted order, without what is below ``skip``.

    A change of a medium is noticed by its size; reading every byte of a large folder would cost
    more than building the dataset.
    """
    own = os.path.realpath(skip)
    for top, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if os.path.realpath(f"{top}/{name}") != own)
        for name in sorted(files):
            path = Path(top, name)
            try:
                yield f"{path.relative_to(folder)}:{path.stat().st_size}"
            except OSError:
                yield f"{path.relative_to(folder)}:?"
