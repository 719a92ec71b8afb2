"""The manifest: what a finished stage folder says of itself."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmtune import __version__
from mmtune.errors import DataError, IntegrityError
from mmtune.files import file_digest, value_digest, write_json

MANIFEST = "manifest.json"
SCHEMA_VERSION = 2
"""Of a manifest with the sha256 of what it says; those of 1 have none."""
_DIGEST_OF_ALL = "sha256"
_COMMANDS = {"assemble": "pretrain"}
"""Command of a stage that has none of its own."""
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """What a finished stage folder says of itself.

    Attributes:
        stage: The stage that made the folder.
        hash: Hash of config, inputs' bytes, parents and code version.
        config: The resolved settings of the stage.
        inputs: Input name to the sha256 of its bytes.
        parents: Stage name to the hash of the folder it was made from.
        rows: Rows per split.
        drops: Refused rows by reason code.
        facts: What later stages must know.
        timings: Seconds by part.
        files: Relative path to its size and sha256.
        versions: Library name to version.
    """

    stage: str
    hash: str
    config: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    drops: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    mmtune_version: str = __version__
    schema: int = SCHEMA_VERSION

    def hash_without(self, setting: str) -> str:
        """Returns the hash that the folder would have without a setting; its own where it has none of that name.

        For stages that read nothing of what the setting adds: they stay as they are where it changes.
        """
        config = {name: value for name, value in self.config.items() if name != setting}
        basis = {"stage": self.stage, "config": config, "inputs": self.inputs, "parents": self.parents}
        return folder_hash(basis, self.mmtune_version)


def folder_hash(basis: Mapping[str, Any], code: str) -> str:
    """Returns the hash of a folder by ``stage``, ``config``, ``inputs`` and ``parents``, and by mmtune's version."""
    return stage_hash({**basis, "code": code})


def command_of(stage: str) -> str:
    """Returns the command that makes a stage's folder."""
    return _COMMANDS.get(stage, stage)


def stage_hash(payload: Mapping[str, Any]) -> str:
    """Returns the sha256 of the canonical JSON form of a payload."""
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def library_versions() -> dict[str, str]:
    """Returns the versions of the libraries a result depends on, without importing them."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in (
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "pillow",
        "av",
        "torchvision",
        "tokenizers",
        "numpy",
    ):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def is_finished(folder: Path) -> bool:
    """Says whether a folder holds a finished stage."""
    return (folder / MANIFEST).is_file()


def is_made(folder: Path, config: Mapping[str, Any], parents: Mapping[str, str]) -> bool:
    """Says whether a folder holds a stage finished with these settings, made from these parents."""
    if not is_finished(folder):
        return False
    made = read_manifest(folder)
    return made.config == json.loads(json.dumps(config, default=str)) and made.parents == dict(parents)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest of a folder, with the sha256 of all that it says."""
    told = asdict(manifest)
    write_json(folder / MANIFEST, {**told, _DIGEST_OF_ALL: value_digest(told)})


def read_manifest(folder: Path, *, made_by: str = "", verify: bool = False) -> Manifest:
    """Returns the manifest of a finished stage folder, what it says and its files' sizes checked.

    Args:
        folder: The stage folder.
        made_by: The command that makes it, for the hint when it is missing.
        verify: Also compare every file's sha256.

    Raises:
        DataError: The folder is missing or not finished.
        IntegrityError: The manifest is unreadable, or a file is missing or changed.
    """
    path = folder / MANIFEST
    hint = f"run: mmtune {made_by}" if made_by else "run the stage that makes it"
    if not path.is_file():
        raise DataError(f"{folder} is not there or not finished", hint, "stage_missing")
    again = f"{hint} --force" if made_by else f"{hint} again, with --force"
    manifest = _parsed(path, again)
    for name, expected in manifest.files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else -1
        if size != expected["size"]:
            found = "missing" if size < 0 else f"{size} bytes instead of {expected['size']}"
            raise IntegrityError(f"{file} is {found}", again, "damaged_file")
    if verify:
        verify_files(folder, manifest)
    return manifest


def _parsed(path: Path, again: str) -> Manifest:
    """Returns what a manifest says, every byte of it as it was written."""
    try:
        told = json.loads(path.read_text("utf-8"))
        schema = told.get("schema", 0)
        digest = told.pop(_DIGEST_OF_ALL, None)
        if digest != (None if schema == 1 else value_digest(told)):
            raise IntegrityError(f"{path} is damaged: it does not have the recorded bytes", again, "bad_manifest")
        if schema > SCHEMA_VERSION:
            raise IntegrityError(f"{path} was written by a newer mmtune ({told['mmtune_version']})", "upgrade mmtune")
        return Manifest(**told)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise IntegrityError(f"{path} cannot be read as a manifest", again, "bad_manifest") from error


def verify_files(folder: Path, manifest: Manifest, part: str = "") -> None:
    """Reads the files of a finished stage and compares their bytes with the manifest.

    Args:
        folder: The stage folder.
        manifest: What it says of itself.
        part: Only what is below this folder of it, such as a split.

    Raises:
        IntegrityError: A file is missing, or does not have the recorded sha256.
    """
    command = command_of(manifest.stage)
    for name, expected in manifest.files.items():
        if part and not name.startswith(f"{part}/"):
            continue
        file = folder / name
        if not file.is_file() or file_digest(file) != expected["sha256"]:
            raise IntegrityError(
                f"{file} does not have the recorded bytes", f"run: mmtune {command} --force", "damaged_file"
            )


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns one line per leaf that differs between two nested mappings, such as ``config.sources[0].split: ...``."""
    return list(_changes(old, new, ""))


def _changes(before: Any, after: Any, name: str) -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in sorted({*before, *after}):
            yield from _changes(before.get(key), after.get(key), f"{name}.{key}" if name else key)
    elif _lists_of_objects(before, after):
        for at, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _changes(one, other, f"{name}[{at}]")
    elif before != after:
        one, other = _text(before), _text(after)
        # Long texts are shown from shortly before the place where they part.
        same = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
        start = same - 20 if same > 50 and max(len(one), len(other)) > 80 else 0
        yield f"{name}: {_brief(one, start)} -> {_brief(other, start)}"


def _lists_of_objects(before: Any, after: Any) -> bool:
    """Says whether two lists can be told apart item by item: as many objects in both."""
    both = isinstance(before, list) and isinstance(after, list) and len(before) == len(after)
    return both and all(isinstance(item, Mapping) for item in (*before, *after))


def _text(value: Any) -> str:
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return value[:12]
    return json.dumps(value, default=str, ensure_ascii=False)


def _brief(text: str, start: int) -> str:
    shown = f"...{text[start:]}" if start else text
    return shown if len(shown) <= 80 else shown[:77] + "..."
