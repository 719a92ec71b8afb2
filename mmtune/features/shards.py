"""Features of media on disk: shards with fixed members, each complete or absent.

A shard is one safetensors file. Its header says what made it (``source``) and lists its members:
the medium, the file it was made from (size, time, sha256) and where its rows stand, with the sha256
of all that. What a shard holds depends on its members alone, so a shard that is made again has the
same bytes.

Shapes: N rows of a medium (tokens, or units of a projector), with any dimensions behind.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mmtune.errors import IntegrityError
from mmtune.files import file_digest, sync, write_tensors
from mmtune.media.paths import MediaRefused, resolve
from mmtune.records import Medium

SHARD_BYTES = 256 << 20
# Raised when what a header says changes.
_LAYOUT = "3"
# The one entry of a header: of several, safetensors writes a random one first.
_ABOUT = "shard"


@dataclass(frozen=True, slots=True)
class Item:
    """What has features: an image, a sound, or one sampled frame of a video.

    Attributes:
        medium: The pointer.
        frame: Index of the sampled frame.
        frames: Number of sampled frames; 0 for an image or a sound.
    """

    medium: Medium
    frame: int = 0
    frames: int = 0


@dataclass(frozen=True, slots=True)
class Member:
    """An item inside a shard.

    Attributes:
        item: Name of the item; see ``item_name``.
        size: Bytes of the file.
        mtime_ns: When the file was written last.
        digest: sha256 of the file's bytes.
        start: Its first row.
        length: Its rows, N.
        tokens: Media tokens it was made for, as tokens/ counts them.
        grid: The family's grid of it (``image_grid_thw``), or empty.
        audio_frames: Spectrogram frames of a sound, where the family places tokens by them, or 0.
    """

    item: str
    size: int
    mtime_ns: int
    digest: str
    start: int
    length: int
    tokens: int
    grid: tuple[int, ...] = ()
    audio_frames: int = 0


def item_name(item: Item) -> str:
    """Returns what names an item in a shard."""
    return json.dumps([item.medium.path, item.frame, item.frames])


def stand_of(item: Item, root: Path) -> tuple[int, int, str]:
    """Returns size, time of writing and sha256 of an item's file.

    Raises:
        MediaRefused: The file is gone or unsafe.
    """
    file = Path(resolve(root, item.medium.path))
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, file_digest(file)


def cut(lengths: Sequence[int], row_bytes: float, shard_bytes: int | None = None) -> list[range]:
    """Returns which items, given their rows, stand in which shard of at most ``shard_bytes``."""
    most = shard_bytes or SHARD_BYTES
    shards, first, held = [], 0, 0
    for index, length in enumerate(lengths):
        if held and (held + length) * row_bytes > most:
            shards.append(range(first, index))
            first, held = index, 0
        held += length
    return [*shards, range(first, len(lengths))] if lengths else []


def shard_path(folder: Path, number: int) -> Path:
    """Returns the file of a shard."""
    return folder / f"shard-{number:05d}.safetensors"


def write_shard(path: Path, source: str, members: Sequence[Member], tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a shard aside, syncs it and renames it into its place.

    Args:
        path: Its file.
        source: What made the features.
        members: What it holds.
        tensors: By name, ``(sum of N, ...)``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    about = json.dumps({"layout": _LAYOUT, "source": source, "members": [asdict(member) for member in members]})
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        write_tensors(aside, kept, {_ABOUT: json.dumps([_digest(about, kept), about])})
        aside.replace(path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def _digest(about: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Returns the sha256 of what a shard says of itself and of all its rows."""
    found = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_members(path: Path, source: str) -> list[Member] | None:
    """Returns what a shard holds; None where it is absent, cannot be read or was made by something else."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(json.loads(file.metadata()[_ABOUT])[1])
        if (about["layout"], about["source"]) != (_LAYOUT, source):
            return None
        return [Member(**{**fields, "grid": tuple(fields["grid"])}) for fields in about["members"]]
    except (OSError, SafetensorError, ValueError, LookupError, TypeError):
        # Absent, or a header of something else.
        return None


def is_whole(path: Path) -> bool:
    """Says whether a shard has the bytes that were written; reads all of them."""
    try:
        with safe_open(path, "pt") as file:
            digest, about = json.loads(file.metadata()[_ABOUT])
            found = _digest(about, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError):
        return False
    return bool(found == digest)


def is_fresh(members: Sequence[Member] | None, items: Sequence[Item], root: Path) -> bool:
    """Says whether a shard holds these very items, made from the files as they are now.

    A file of the same size and time is taken as unchanged; any other is read to compare its sha256.
    """
    if members is None or [member.item for member in members] != [item_name(item) for item in items]:
        return False
    return all(_unchanged(member, item, root) for member, item in zip(members, items, strict=True))


def _unchanged(member: Member, item: Item, root: Path) -> bool:
    try:
        file = Path(resolve(root, item.medium.path))
        stat = file.stat()
        same = (stat.st_size, stat.st_mtime_ns) == (member.size, member.mtime_ns)
        return same or (stat.st_size == member.size and file_digest(file) == member.digest)
    except (OSError, MediaRefused):
        return False


def read_rows(file: Any, rows: slice) -> dict[str, torch.Tensor]:
    """Returns some rows of every tensor of an opened shard."""
    return {name: file.get_slice(name)[rows] for name in file.keys()}  # noqa: SIM118


def joined_features(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Returns the tensors of several items one after the other; a mask that an item lacks is false in all its rows."""
    joined = {}
    for name in sorted({name for part in parts for name in part}):
        own = [part[name] if name in part else _no_mask(part) for part in parts]
        joined[name] = torch.cat(own)
    return joined


def _no_mask(part: Mapping[str, torch.Tensor]) -> torch.Tensor:
    rows = max(len(tensor) for tensor in part.values())
    return torch.zeros(rows, dtype=torch.bool)


class Features:
    """The features of a folder's shards, by item; loader processes may share it.

    Args:
        paths: The shards.
        source: What made them.
        read: An opened shard and some rows to the tensors they stand for.

    Raises:
        IntegrityError: A shard cannot be read.
        KeyError: On ``[item]``, when no shard holds it.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        source: str,
        read: Callable[[Any, slice], dict[str, torch.Tensor]] = read_rows,
    ) -> None:
        self._paths, self._read = list(paths), read
        self._handles: dict[tuple[int, int], Any] = {}
        self._places: dict[str, tuple[int, Member]] = {}
        for number, path in enumerate(self._paths):
            members = read_members(path, source)
            if members is None:
                raise IntegrityError(f"{path} cannot be read", "delete it and run the same command again")
            self._places |= {member.item: (number, member) for member in members}

    def tokens(self, item: Item) -> int:
        """Returns the media tokens that an item's features stand for."""
        return self._places[item_name(item)][1].tokens

    def __contains__(self, item: Item) -> bool:
        return item_name(item) in self._places

    def __getitem__(self, item: Item) -> dict[str, torch.Tensor]:
        """Returns the item's tensors ``(N, ...)`` by name.

        Where it has them, its ``image_grid_thw`` ``(1, 3)`` and its ``audio_frames`` ``(1,)`` are with them.
        """
        number, member = self._places[item_name(item)]
        found = self._read(self._file(number), slice(member.start, member.start + member.length))
        found = {**found, **({"image_grid_thw": torch.tensor([member.grid])} if member.grid else {})}
        return found | ({"audio_frames": torch.tensor([member.audio_frames])} if member.audio_frames else {})

    def _file(self, number: int) -> Any:
        # One handle per process: a forked reader must not share its parent's.
        key = (number, os.getpid())
        if key not in self._handles:
            self._handles[key] = safe_open(self._paths[number], "pt")
        return self._handles[key]
