"""Files that survive a crash: digests, synced writes, a folder renamed into its place."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmtune.errors import ResourceError

_EXHAUSTED = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EFBIG)


def file_digest(path: Path) -> str:
    """Returns the sha256 hex digest of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def value_digest(value: Any) -> str:
    """Returns the sha256 of a JSON value, which stays the same when it is written and read."""
    plain = json.loads(json.dumps(value, default=str))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file and syncs it."""
    with open(path, "w", encoding="utf-8") as handle:
        json.dump(value, handle, indent=1, ensure_ascii=False, default=str)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file and syncs it.

    Args:
        path: The file.
        tensors: By name, contiguous.
        metadata: Strings for its header.

    Raises:
        OSError: As of any write; safetensors itself names the system's error in its text alone.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        system = _system_error(error, str(path))
        if system is None:
            raise
        raise system from error
    sync(path)


def _system_error(error: Exception, path: str | None = None) -> OSError | None:
    """Returns the system's error in the text of an error of safetensors."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1])), path) if number else None


def _kinds() -> tuple[type[Exception], ...]:
    """Returns the errors of a write: the system's, and those of safetensors where it is in use."""
    library = sys.modules.get("safetensors")
    return (OSError, library.SafetensorError) if library else (OSError,)


def sync(path: Path) -> None:
    """Makes a file's bytes, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(source: Path, target: Path) -> None:
    """Renames a complete folder to its final name, replacing an older one."""
    old = target.parent / f".{target.name}.tmp-old-{secrets.token_hex(4)}"
    if target.exists():
        os.rename(target, old)
    os.rename(source, target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turns a full disk into a clear error, so that no caller needs to know errno values.

    Raises:
        ResourceError: No space or no file handles are left.
    """
    try:
        yield
    except _kinds() as error:
        system = error if isinstance(error, OSError) else _system_error(error)
        if system is not None and system.errno in _EXHAUSTED:
            raise ResourceError(
                f"{what}: {os.strerror(system.errno)}{f' ({system.filename})' if system.filename else ''}",
                "free some space (or raise the limit) and run the same command again",
            ) from error
        raise
