"""Stage folders: complete or absent. The only module that publishes them.

A stage writes into an aside folder beside its target; ``publish`` syncs every file, writes
``manifest.json`` last and renames. A folder with a manifest is finished, one without does
not exist for any reader.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mmtune import __version__
from mmtune.errors import IntegrityError, LockedError, RecipeError
from mmtune.files import disk_errors, file_digest, replace_folder, sync
from mmtune.storage.manifest import (
    Manifest,
    changes,
    command_of,
    folder_hash,
    is_finished,
    library_versions,
    read_manifest,
    verify_files,
    write_manifest,
)


class Staging:
    """The aside folder of a stage in progress, and its publication.

    Attributes:
        path: Write here; the folder appears under its final name on ``publish``.
        reasons: Why an existing folder is being rebuilt; empty when there was none.
    """

    def __init__(
        self, target: Path, identity: Mapping[str, Any], lock: IO[str], reasons: list[str], others: Sequence[str] = ()
    ) -> None:
        self.target = target
        self.reasons = reasons
        self._others = others
        self._identity = identity
        self._lock = lock
        self._started = time.monotonic()
        self.path = target.parent / f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        self.path.mkdir()

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *exc: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()
        for error in exc:
            if isinstance(error, Exception):
                # A full disk is told with what was being written, whichever library met it.
                with disk_errors(f"writing {self.target}"):
                    raise error

    def publish(
        self,
        *,
        rows: Mapping[str, int] | None = None,
        drops: Mapping[str, int] | None = None,
        facts: Mapping[str, Any] | None = None,
        timings: Mapping[str, float] | None = None,
    ) -> Manifest:
        """Makes the folder appear complete under its final name; returns its manifest."""
        if rows:
            splits = {"splits": [name for name in rows if (self.path / name).is_dir()]}
            if splits["splits"]:
                (self.path / "dataset_dict.json").write_text(json.dumps(splits), "utf-8")
        files = {}
        for file in sorted(path for path in self.path.rglob("*") if path.is_file()):
            sync(file)
            name = file.relative_to(self.path).as_posix()
            files[name] = {"size": file.stat().st_size, "sha256": file_digest(file)}
        manifest = Manifest(
            **self._identity,
            rows=dict(rows or {}),
            drops=dict(drops or {}),
            facts=dict(facts or {}),
            timings={**(timings or {}), "total_seconds": round(time.monotonic() - self._started, 3)},
            files=files,
            versions=library_versions(),
        )
        write_manifest(self.path, manifest)
        for folder in [self.path, *(path for path in self.path.rglob("*") if path.is_dir())]:
            sync(folder)
        for name in self._others:
            if (self.target / name).exists():
                (self.target / name).rename(self.path / name)
        replace_folder(self.path, self.target)
        return manifest


def _say_nothing(line: str) -> None:
    pass


def _check_nothing() -> None:
    pass


def open_stage(
    target: Path,
    *,
    stage: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
    parents: Mapping[str, str] | None = None,
    force: bool = False,
    on_change: str = "rebuild",
    others: Sequence[str] = (),
    say: Callable[[str], None] = _say_nothing,
) -> Staging | None:
    """Returns an aside folder to fill, or None when the target is finished with equal hashes.

    Args:
        target: The final folder, such as ``run_dir/tokens``.
        stage: Name of the stage.
        config: Its resolved settings; anything that changes the output.
        inputs: Input name to sha256 of its bytes.
        parents: Name of a folder beside the target to its manifest hash. Where there is work to do, their files are
            read and compared with what their manifests say: no stage learns from damaged bytes.
        force: Redo even if nothing changed.
        on_change: ``rebuild`` or ``refuse`` when the target is finished with other hashes.
        others: Names inside the target that belong to another stage; they stay as they are.
        say: Told that the target is reused, or why it is made again.

    Raises:
        RecipeError: The target holds something that mmtune did not make.
        IntegrityError: The target was made with other settings and ``on_change`` is refuse, or a parent is damaged.
        LockedError: Another run is writing it.
    """
    identity = _identity(stage, config, inputs, parents)
    lock = _lock(target)
    try:
        reasons = _check_target(target, identity, force, on_change, others)
        # What killed runs left: nobody else writes here while the lock is held.
        for stale in target.parent.glob(f".{target.name}.tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        if reasons is None:
            say(f"{stage}: {target} is up to date; nothing to do")
            lock.close()
            return None
        verify_parents(target, parents or ())
        for reason in reasons:
            say(f"{stage}: again, because of {reason}")
        return Staging(target, identity, lock, reasons, others)
    except BaseException:
        lock.close()
        raise


def verify_parents(target: Path, parents: Iterable[str]) -> None:
    """Reads the files of the folders beside a target that it is made from, and compares them with their manifests.

    Raises:
        IntegrityError: One is missing, or does not have the recorded bytes.
    """
    for parent in (target.parent / name for name in parents):
        if is_finished(parent):
            verify_files(parent, read_manifest(parent))


def foresee(
    target: Path,
    *,
    stage: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
    parents: Mapping[str, str] | None = None,
    force: bool = False,
    on_change: str = "rebuild",
    others: Sequence[str] = (),
    check: Callable[[], None] = _check_nothing,
) -> str:
    """Returns what ``open_stage`` would do, in words; takes no lock and writes nothing.

    Arguments are those of ``open_stage``, and ``check``, which is called where there is work to do and raises what
    would end it.

    Raises:
        RecipeError: As ``open_stage``.
        IntegrityError: As ``open_stage``.
    """
    reasons = _check_target(target, _identity(stage, config, inputs, parents), force, on_change, others)
    if reasons is None:
        return f"{stage}: {target} is up to date; nothing to do"
    check()
    return f"{stage}: would write {target}{' again, because of ' if reasons else ''}{'; '.join(reasons)}"


def _identity(
    stage: str, config: Mapping[str, Any], inputs: Mapping[str, str] | None, parents: Mapping[str, str] | None
) -> dict[str, Any]:
    config = json.loads(json.dumps(config, default=str))
    basis = {"stage": stage, "config": config, "inputs": dict(inputs or {}), "parents": dict(parents or {})}
    return {**basis, "hash": folder_hash(basis, __version__)}


def _check_target(
    target: Path, identity: dict[str, Any], force: bool, on_change: str, others: Sequence[str]
) -> list[str] | None:
    """Returns why the target must be rebuilt (empty: it is not there), or None to reuse it."""
    if target.exists() and not target.is_dir():
        raise RecipeError(f"{target} is a file, not a folder", "choose another run_dir", "foreign_folder")
    if not target.exists() or all(path.name in others for path in target.iterdir()):
        return []
    if not is_finished(target):
        raise RecipeError(
            f"{target} holds files that mmtune did not make; nothing was touched",
            "choose another run_dir, or move that folder away",
            "foreign_folder",
        )
    try:
        old = read_manifest(target, made_by=command_of(identity["stage"]))
    except IntegrityError:
        if force or on_change == "rebuild":
            return ["the finished folder is damaged"]
        raise
    if old.hash == identity["hash"]:
        return ["--force"] if force else None
    different = changes(
        {"config": old.config, "inputs": old.inputs, "parents": old.parents, "code": old.mmtune_version},
        {
            **{key: identity[key] for key in ("config", "inputs", "parents")},
            "code": __version__,
        },
    )
    if on_change == "refuse" and not force:
        raise IntegrityError(
            f"{target} was made with other settings or data: " + "; ".join(different),
            f"replace it alone: mmtune {command_of(identity['stage'])} --force, or keep both: another run_dir",
            "changed",
        )
    return different


def _lock(target: Path) -> IO[str]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = open(target.parent / f".{target.name}.lock", "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE):
            raise
        raise RecipeError(f"cannot write in {target.parent}: {error.strerror}", "choose another run_dir") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.seek(0)
        owner = handle.read().strip()
        handle.close()
        raise LockedError(
            f"{target} is being written by another run{f' (pid {owner})' if owner else ''}",
            "wait for it, or stop it",
        ) from error
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle
