"""Stage folders: complete or absent. The only module that publishes files.

A stage writes into an aside folder beside its target; ``publish`` syncs every file, writes
``manifest.json`` last and renames. A folder with a manifest is finished, one without does
not exist for any reader.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mmtune import __version__
from mmtune.errors import DataError, IntegrityError, LockedError, RecipeError, ResourceError

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
_CHUNK = 1 << 20


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


def stage_hash(payload: Mapping[str, Any]) -> str:
    """Returns the sha256 of the canonical JSON form of a payload."""
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_digest(path: Path) -> str:
    """Returns the sha256 hex digest of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def library_versions() -> dict[str, str]:
    """Returns the versions of the libraries a result depends on, without importing them."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "peft", "accelerate", "datasets", "pillow", "tokenizers", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def is_finished(folder: Path) -> bool:
    """Says whether a folder holds a finished stage."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path, *, made_by: str = "", verify: bool = False) -> Manifest:
    """Returns the manifest of a finished stage folder, its files' sizes checked.

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
    try:
        fields = json.loads(path.read_text("utf-8"))
        if fields.get("schema", 0) > SCHEMA_VERSION:
            raise IntegrityError(
                f"{path} was written by a newer mmtune ({fields.get('mmtune_version')})", "upgrade mmtune"
            )
        manifest = Manifest(**fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path} cannot be read as a manifest", f"{hint} --force", "bad_manifest") from error
    for name, expected in manifest.files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else -1
        if size != expected["size"]:
            found = "missing" if size < 0 else f"{size} bytes instead of {expected['size']}"
            raise IntegrityError(f"{file} is {found}", f"{hint} --force", "damaged_file")
        if verify and file_digest(file) != expected["sha256"]:
            raise IntegrityError(f"{file} does not have the recorded bytes", f"{hint} --force", "damaged_file")
    return manifest


def changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns one line per leaf that differs between two nested mappings."""
    lines = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        name = f"{prefix}{key}"
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += changes(before, after, f"{name}.")
        elif before != after:
            lines.append(f"{name}: {_brief(before)} -> {_brief(after)}")
    return lines


def _brief(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


class Staging:
    """The aside folder of a stage in progress, and its publication.

    Attributes:
        path: Write here; the folder appears under its final name on ``publish``.
        reasons: Why an existing folder is being rebuilt; empty when there was none.
    """

    def __init__(self, target: Path, identity: Mapping[str, Any], lock: IO[str], reasons: list[str]) -> None:
        self.target = target
        self.reasons = reasons
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
            _fsync(file)
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
        write_json(self.path / MANIFEST, asdict(manifest))
        for folder in [self.path, *(path for path in self.path.rglob("*") if path.is_dir())]:
            _fsync(folder)
        replace_folder(self.path, self.target)
        return manifest


def open_stage(
    target: Path,
    *,
    stage: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
    parents: Mapping[str, str] | None = None,
    force: bool = False,
    on_change: str = "rebuild",
) -> Staging | None:
    """Returns an aside folder to fill, or None when the target is finished with equal hashes.

    Args:
        target: The final folder, such as ``run_dir/tokens``.
        stage: Name of the stage.
        config: Its resolved settings; anything that changes the output.
        inputs: Input name to sha256 of its bytes.
        parents: Stage name to manifest hash.
        force: Redo even if nothing changed.
        on_change: ``rebuild`` or ``refuse`` when the target is finished with other hashes.

    Raises:
        RecipeError: The target holds something that mmtune did not make.
        IntegrityError: The target was made with other settings and ``on_change`` is refuse.
        LockedError: Another run is writing it.
    """
    config = json.loads(json.dumps(config, default=str))
    basis = {"stage": stage, "config": config, "inputs": dict(inputs or {}), "parents": dict(parents or {})}
    identity = {**basis, "hash": stage_hash({**basis, "code": __version__})}
    lock = _lock(target)
    try:
        reasons = _check_target(target, identity, force, on_change)
        if reasons is None:
            lock.close()
            return None
        for stale in target.parent.glob(f".{target.name}.tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        return Staging(target, identity, lock, reasons)
    except BaseException:
        lock.close()
        raise


def _check_target(target: Path, identity: dict[str, Any], force: bool, on_change: str) -> list[str] | None:
    """Returns why the target must be rebuilt (empty: it is not there), or None to reuse it."""
    if target.exists() and not target.is_dir():
        raise RecipeError(f"{target} is a file, not a folder", "choose another run_dir", "foreign_folder")
    if not target.exists() or not any(target.iterdir()):
        return []
    if not is_finished(target):
        raise RecipeError(
            f"{target} holds files that mmtune did not make; nothing was touched",
            "choose another run_dir, or move that folder away",
            "foreign_folder",
        )
    try:
        old = read_manifest(target)
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
            "use --force to replace it, or another run_dir to keep both",
            "changed",
        )
    return different


def _lock(target: Path) -> IO[str]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = open(target.parent / f".{target.name}.lock", "a+", encoding="utf-8")  # noqa: SIM115
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
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


def replace_folder(source: Path, target: Path) -> None:
    """Renames a complete folder to its final name, replacing an older one."""
    old = target.parent / f".{target.name}.tmp-old-{secrets.token_hex(4)}"
    if target.exists():
        os.rename(target, old)
    os.rename(source, target)
    _fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file and syncs it."""
    with open(path, "w", encoding="utf-8") as handle:
        json.dump(value, handle, indent=1, ensure_ascii=False, default=str)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RejectLog:
    """Refused rows, one JSON line each, with a count by reason.

    Attributes:
        counts: Reason code to number of rows.
    """

    def __init__(self, path: Path) -> None:
        self.counts: dict[str, int] = {}
        self._handle = open(path, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115

    def write(self, reject: Any) -> None:
        """Adds one ``records.Reject``."""
        self.counts[reject.reason] = self.counts.get(reject.reason, 0) + 1
        self._handle.write(json.dumps(asdict(reject), ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Flushes the file."""
        self._handle.close()

    def __enter__(self) -> RejectLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class SplitWriter:
    """One Arrow stream file of a split, written in batches of bounded size."""

    def __init__(self, path: Path, schema: pa.Schema, rows_per_batch: int = 1000) -> None:
        import pyarrow

        path.parent.mkdir(parents=True, exist_ok=True)
        self._schema = schema
        self._rows: list[dict[str, Any]] = []
        self._size = rows_per_batch
        self._arrow = pyarrow
        self._sink = pyarrow.OSFile(str(path), "wb")
        self._stream = pyarrow.ipc.new_stream(self._sink, schema)
        self.count = 0

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds one row."""
        self._rows.append(dict(row))
        self.count += 1
        if len(self._rows) >= self._size:
            self._flush()

    def write_batch(self, batch: pa.RecordBatch) -> None:
        """Adds a ready record batch of the same schema."""
        self._flush()
        self._stream.write_batch(batch)
        self.count += batch.num_rows

    def _flush(self) -> None:
        if self._rows:
            self._stream.write_batch(self._arrow.RecordBatch.from_pylist(self._rows, schema=self._schema))
            self._rows = []

    def close(self) -> int:
        """Ends the file; returns the number of rows in it."""
        self._flush()
        self._stream.close()
        self._sink.close()
        return self.count


def finish_split(folder: Path, schema: pa.Schema) -> int:
    """Names a split's ``*.arrow`` shards in order and makes it a ``load_from_disk`` folder.

    Shards are taken in the order of their file names. Returns the number of rows.
    """
    import datasets
    import pyarrow

    folder.mkdir(parents=True, exist_ok=True)
    shards = sorted(folder.glob("*.arrow"))
    if not shards:
        SplitWriter(folder / "shard-00000.arrow", schema).close()
        shards = sorted(folder.glob("*.arrow"))
    names = []
    for index, shard in enumerate(shards):
        name = f"data-{index:05d}-of-{len(shards):05d}.arrow"
        os.rename(shard, folder / name)
        names.append(name)
    rows = sum(_stream_table(folder / name).num_rows for name in names)
    digest = hashlib.sha256(b"".join(file_digest(folder / name).encode() for name in names)).hexdigest()
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": digest[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": folder.name,
    }
    features = datasets.Features.from_arrow_schema(pyarrow.schema(list(schema)))
    info = datasets.DatasetInfo(features=features)
    (folder / "state.json").write_text(json.dumps(state, indent=1), "utf-8")
    info.write_to_directory(str(folder))
    return rows


def _stream_table(path: Path) -> pa.Table:
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()


def open_split(folder: Path) -> pa.Table:
    """Returns a split as a memory-mapped table; its data pages are read on use.

    Raises:
        DataError: The split is not there.
    """
    import pyarrow

    shards = sorted(folder.glob("data-*.arrow"))
    if not shards:
        have = sorted(path.name for path in folder.parent.glob("*") if path.is_dir())
        raise DataError(
            f"{folder} is not there; splits found: {', '.join(have) or 'none'}",
            "check the `split` of the sources in the recipe",
            "split_missing",
        )
    return pyarrow.concat_tables([_stream_table(shard) for shard in shards])


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turns a full disk into a clear error, so that no caller needs to know errno values.

    Raises:
        ResourceError: No space or no file handles are left.
    """
    import errno

    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EFBIG):
            raise ResourceError(
                f"{what}: {os.strerror(error.errno)}{f' ({error.filename})' if error.filename else ''}",
                "free some space (or raise the limit) and run the same command again",
            ) from error
        raise
