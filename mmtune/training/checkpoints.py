"""Checkpoints: safetensors and JSON, written aside, verified before older ones go.

A checkpoint is ``step-00000200/`` with ``trainable.safetensors``, ``optimizer.safetensors``,
``metrics.jsonl`` and ``state.json`` (written last, with the sha256 of the others and of what
it says itself, but for the surroundings, which are only told: no flipped byte counts steps anew). There is
no random state to keep: every step draws its own seed from (seed, step, rank).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtune.errors import IntegrityError
from mmtune.files import disk_errors, file_digest, replace_folder, sync, value_digest, write_json, write_tensors

STATE = "state.json"
_TOLD = ("step", "identity", "sums", "files")
_DIGEST = "sha256"
"""Of what is told; surroundings are only spoken of."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint on disk.

    Attributes:
        folder: Where it stands.
        step: Optimizer steps it has seen.
        identity: Settings and parents of the run that wrote it.
        sums: Of the metrics since their last line.
        surroundings: Of the run that wrote it, see ``surroundings``.
    """

    folder: Path
    step: int
    identity: Mapping[str, Any]
    sums: dict[str, float]
    surroundings: Mapping[str, Any]


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: Their parent folder.
        keep: How many stay.
        command: The command that writes them, for the advice.
    """

    def __init__(self, folder: Path, keep: int, command: str = "finetune") -> None:
        self.folder, self._keep, self._command = folder, keep, command

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Any]],
        metrics: str,
        identity: Mapping[str, Any],
        sums: Mapping[str, float] | None = None,
        surroundings: Mapping[str, Any] | None = None,
    ) -> Path:
        """Writes a checkpoint, verifies it, then removes the oldest beyond ``keep``.

        Raises:
            ResourceError: The disk is full; the earlier checkpoints are as they were.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f".tmp-{os.getpid()}-{step}"
        shutil.rmtree(aside, ignore_errors=True)
        target = self.folder / f"step-{step:08d}"
        size = sum(tensor.numel() * tensor.element_size() for state in tensors.values() for tensor in state.values())
        with disk_errors(f"the checkpoint of step {step} needs {size:,} bytes"):
            try:
                aside.mkdir()
                for name, own in tensors.items():
                    write_tensors(aside / f"{name}.safetensors", own)
                (aside / "metrics.jsonl").write_text(metrics, "utf-8")
                sync(aside / "metrics.jsonl")
                files = {file.name: file_digest(file) for file in sorted(aside.iterdir())}
                told = dict(zip(_TOLD, (step, dict(identity), dict(sums or {}), files), strict=True))
                digest = value_digest(told)
                write_json(aside / STATE, {**told, "surroundings": dict(surroundings or {}), _DIGEST: digest})
                replace_folder(aside, target)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        self._read(target)
        for old in self._folders()[: -self._keep]:
            self._remove(old)
        return target

    def sweep(self) -> None:
        """Removes what a killed run left half-written or half-removed; only the holder of the run's lock may."""
        for left in self.folder.glob(".*tmp-*"):
            shutil.rmtree(left, ignore_errors=True)

    def newest(self) -> Checkpoint | None:
        """Returns the newest checkpoint, verified, or None when there is none.

        Raises:
            IntegrityError: It is damaged. An older whole one is offered, not taken in silence.
        """
        folders = self._folders()
        if not folders:
            return None
        try:
            return self._read(folders[-1])
        except IntegrityError as error:
            again = f"start again: mmtune {self._command} --resume never"
            whole = next((folder for folder in reversed(folders[:-1]) if self._is_whole(folder)), None)
            if whole is not None:
                again = f"delete {folders[-1]} and run the same command again to go on from {whole.name}, or {again}"
            raise IntegrityError(error.message, again, error.code) from error

    def _is_whole(self, folder: Path) -> bool:
        try:
            self._read(folder)
        except IntegrityError:
            return False
        return True

    def newest_identity(self) -> dict[str, Any] | None:
        """Returns the identity in the newest checkpoint, tensors unread; None where there is none or it is damaged."""
        folders = self._folders()
        try:
            found: dict[str, Any] = self._state_of(folders[-1])["identity"]
        except (IndexError, IntegrityError):
            return None
        return found

    def newest_name(self) -> str:
        """Returns the path of the newest checkpoint for a message, unverified."""
        folders = self._folders()
        return str(folders[-1]) if folders else "none yet"

    def stopped_redo(self, steps: int) -> str:
        """Says that a finished run of ``steps`` steps was being made again when it was stopped, or nothing."""
        folders = self._folders()
        step = int(folders[-1].name.removeprefix("step-")) if folders else steps
        if step == steps:
            return ""
        again = f"mmtune {self._command} --force"
        return f"{self._command}: a run with --force was stopped after step {step}; it goes on by: {again}"

    def load(self, checkpoint: Checkpoint, name: str) -> dict[str, Any]:
        """Returns one of the tensor files of a checkpoint."""
        from safetensors.torch import load_file

        return load_file(checkpoint.folder / f"{name}.safetensors")

    def metrics(self, checkpoint: Checkpoint) -> str:
        """Returns the metrics lines up to the checkpoint."""
        return (checkpoint.folder / "metrics.jsonl").read_text("utf-8")

    def clear(self) -> None:
        """Removes every checkpoint, the oldest first."""
        for folder in self._folders():
            self._remove(folder)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _remove(self, folder: Path) -> None:
        """Removes a checkpoint; killed on the way, it leaves none that looks damaged."""
        gone = self.folder / f".tmp-{os.getpid()}-{folder.name}"
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _folders(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def _state_of(self, folder: Path) -> dict[str, Any]:
        """Returns what a checkpoint says of itself, whole."""
        try:
            state: dict[str, Any] = json.loads((folder / STATE).read_text("utf-8"))
            told = {name: state[name] for name in _TOLD}
            digest, surroundings = state[_DIGEST], state["surroundings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{folder} has no readable {STATE}", "", "damaged_checkpoint") from error
        if digest != value_digest(told):
            raise IntegrityError(f"{folder / STATE} is damaged", "", "damaged_checkpoint")
        return {**told, "surroundings": surroundings}

    def _read(self, folder: Path) -> Checkpoint:
        state = self._state_of(folder)
        for name, expected in state.pop("files").items():
            path = folder / name
            if not path.is_file() or file_digest(path) != expected:
                raise IntegrityError(f"{path} is missing or damaged", "", "damaged_checkpoint")
        return Checkpoint(folder, **state)
