"""The files of a model's processor: one that was read before is known by them, without being loaded for seconds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
_TEMPLATES = "additional_chat_templates"


def files_digest(folder: Path, further: Mapping[str, object]) -> str | None:
    """Returns a sha256 over every byte of a model's folder but its weights, and over what else decides.

    Args:
        folder: Of the model; None is returned for a hub id, whose files are elsewhere.
        further: What makes another processor of the same files, such as the versions of libraries.
    """
    if not folder.is_dir():
        return None
    found = hashlib.sha256(json.dumps(further, sort_keys=True, default=str).encode())
    for file in sorted((*folder.iterdir(), *folder.glob(f"{_TEMPLATES}/*"))):
        if file.is_file() and file.suffix not in _WEIGHTS:
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            found.update(f"\0{file.relative_to(folder)}\0{content}".encode("utf-8", "surrogatepass"))
    return found.hexdigest()
