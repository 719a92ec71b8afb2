"""The digest of a model's weights, by which a run knows that its base is still the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

_WHOLE = 64 << 20
_PIECES, _PIECE = 256, 64 << 10


def weights_digest(path: str, *, revision: str | None = None, offline: bool = False) -> str:
    """Returns what changes when a model does.

    Of a folder: a sha256 over its config and weights. Of a file over 64 MiB, its size and 256 evenly spaced pieces
    of 64 KiB are taken, so that a model of many gigabytes costs milliseconds; training moves every piece. Of a hub
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
        from mmtune.models.load import load_config

        return str(getattr(load_config(path, revision=revision, offline=offline), "_commit_hash", None) or "")
    total = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]):
        total.update(f"{file.name} {file.stat().st_size} {_file_digest(file)}\n".encode())
    return total.hexdigest()


def _file_digest(file: Path) -> str:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= _WHOLE:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256()
        for piece in range(_PIECES):
            stream.seek((size - _PIECE) * piece // (_PIECES - 1))
            digest.update(stream.read(_PIECE))
        return digest.hexdigest()
