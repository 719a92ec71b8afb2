"""The digest of a model's weights, by which a run knows that its base is still the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

_SMALL = 64 << 20
_PIECE, _BLOCK = 64 << 20, 8 << 20
# A file may change again within one tick of its file system's clock, and look the same.
_SETTLED_SECONDS = 2.0


def weights_digest(path: str, *, revision: str | None = None, offline: bool = False) -> str:
    """Returns what changes when a model does.

    Of a folder: a sha256 over every byte of its config and weights, about half a second of one core per GiB, on all
    cores at once. What was found of a file over 64 MiB is kept in the user's cache folder, and taken from there while
    the file has the same path, size, inode and times of change; nobody sets the kernel's own (ctime) back. Of a hub
    model: the hash of its commit.

    Args:
        path: Folder or hub id.
        revision: Branch, tag or commit of a hub model.
        offline: Never reach for the network.

    Raises:
        CapabilityError: The hub model is not at hand.
    """
    folder = Path(path)
    if not folder.is_dir():
        return _commit(path, revision, offline)
    total = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]):
        total.update(f"{file.name} {file.stat().st_size} {_file_digest(file)}\n".encode())
    return total.hexdigest()


def _commit(path: str, revision: str | None, offline: bool) -> str:
    from transformers.utils import cached_file

    from mmtune.models.load import load_config

    load_config(path, revision=revision, offline=offline)
    # The file that was just read stands in a folder of the hub's cache that has the commit's name.
    found = cached_file(path, "config.json", revision=revision, local_files_only=True)
    return Path(found or "").parent.name


def _file_digest(file: Path) -> str:
    if file.stat().st_size <= _SMALL:
        return _pieces_digest(file)
    stand, place = _stand(file), _place(file)
    known = _known(place, stand)
    if known is not None:
        return known
    digest = _pieces_digest(file)
    if place is not None and stand == _stand(file) and time.time() - file.stat().st_ctime > _SETTLED_SECONDS:
        _keep(place, stand, digest)
    return digest


def _pieces_digest(file: Path) -> str:
    """Returns a sha256 over the sha256 of every 64 MiB, which threads compute side by side."""
    starts = range(0, max(file.stat().st_size, 1), _PIECE)
    with ThreadPoolExecutor(min(len(starts), os.cpu_count() or 1)) as pool:
        return hashlib.sha256(b"".join(pool.map(partial(_piece_digest, file), starts))).hexdigest()


def _piece_digest(file: Path, start: int) -> bytes:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        stream.seek(start)
        for at in range(0, _PIECE, _BLOCK):
            digest.update(stream.read(min(_BLOCK, _PIECE - at)))
    return digest.digest()


def _stand(file: Path) -> list[str | int]:
    stat = file.stat()
    return [str(file.resolve()), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _place(file: Path) -> Path | None:
    """Returns where a file's digest is kept, None for a user without a home."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    name = hashlib.sha256(str(file.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return None if home.startswith("~") else Path(home) / "mmtune" / "weights" / f"{name}.json"


def _known(place: Path | None, stand: list[str | int]) -> str | None:
    try:
        found = json.loads(place.read_text("utf-8")) if place is not None else {}
        return str(found["digest"]) if found["stand"] == stand else None
    except (OSError, ValueError, LookupError, TypeError):
        # Not there, or damaged: the file is read again.
        return None


def _keep(place: Path, stand: list[str | int], digest: str) -> None:
    aside = place.with_name(f".{place.name}.tmp-{os.getpid()}")
    # Where the folder cannot be written, every run reads the file.
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps({"stand": stand, "digest": digest}), "utf-8")
        aside.replace(place)
