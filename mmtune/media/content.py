"""Media told apart by their bytes: a copy under another name is the same medium."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from mmtune.media.paths import MediaRefused, open_medium
from mmtune.records import Medium

_MOST = 200_000
"""Digests that are remembered, about 200 bytes each; the oldest is forgotten first."""
_Key = tuple[str, str]


def own_name(medium: Medium) -> str:
    """Returns a medium's path, or the sha256 of its bytes where they are embedded."""
    return medium.path if medium.data is None else hashlib.sha256(medium.data).hexdigest()


class MediaContents:
    """Gives media of equal bytes equal names.

    The media of rows that may be shown are learned; any other is compared with them. Only files of the size of a
    learned one are read, each once, so that most files are never read.
    """

    def __init__(self) -> None:
        self._names: dict[_Key, str] = {}
        self._sizes: set[int] = set()
        self._unread: dict[int, list[tuple[str, Medium]]] = {}
        self._of_digest: dict[str, str] = {}
        self._digests: dict[_Key, str] = {}

    def learn(self, root: Path | str, medium: Medium) -> str:
        """Returns the name of a medium, and gives it to every later one of the same bytes.

        Args:
            root: Folder that its path is relative to.
            medium: With its bytes, or a path.
        """
        key = (str(root), own_name(medium))
        if key not in self._names:
            size = _size(root, medium)
            self._names[key] = self.name(root, medium)
            self._sizes.add(size)
            self._unread.setdefault(size, []).append((key[0], medium))
        return self._names[key]

    def name(self, root: Path | str, medium: Medium) -> str:
        """Returns the name of the learned medium of the same bytes, or else one that no learned medium has.

        A file that cannot be read is no copy of another one. Arguments as in ``learn``.
        """
        key = (str(root), own_name(medium))
        if key in self._names:
            return self._names[key]
        size, own = _size(root, medium), "\0".join(key)
        if size not in self._sizes or not (digest := self._digest(key[0], medium)):
            return own
        for other_root, other in self._unread.pop(size, ()):
            self._of_digest.setdefault(self._digest(other_root, other), self._names[other_root, own_name(other)])
        return self._of_digest.get(digest, own)

    def _digest(self, root: str, medium: Medium) -> str:
        """Returns the sha256 of a medium's bytes; empty where it cannot be opened."""
        if medium.sha256 or medium.data is not None:
            return medium.sha256 or own_name(medium)
        key = (root, medium.path)
        if key not in self._digests:
            while len(self._digests) >= _MOST:
                del self._digests[next(iter(self._digests))]
            self._digests[key] = _file_digest(root, medium)
        return self._digests[key]


def names_beside(root: Path | str, learned: Iterable[Medium]) -> Callable[[Medium], str]:
    """Returns what names media below a folder; a copy of a learned one has that one's name.

    Args:
        root: Folder that all paths are relative to.
        learned: Media of rows that may be shown.
    """
    contents = MediaContents()
    for medium in learned:
        contents.learn(root, medium)
    return partial(contents.name, root)


def _file_digest(root: str, medium: Medium) -> str:
    try:
        handle, _ = open_medium(root, medium)
    except MediaRefused:
        return ""
    with handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()  # type: ignore[arg-type]


def _size(root: Path | str, medium: Medium) -> int:
    """Returns the size of a medium in bytes; -1 where it cannot be opened."""
    if medium.size_bytes or medium.data is not None:
        return medium.size_bytes or len(medium.data or b"")
    try:
        handle, size = open_medium(root, medium)
    except MediaRefused:
        return -1
    with handle:
        return size
