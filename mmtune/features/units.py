"""What of a dataset has features: every distinct image, sound, video, text and history, once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mmtune.media.known import MediaPlace
from mmtune.media.paths import MediaRefused, check_relative, resolve
from mmtune.records import Medium, Record, Reject, TextPart, items_of

FeatureKind = Literal["image", "audio", "video", "text", "behaviour"]
KINDS: tuple[FeatureKind, ...] = ("image", "audio", "video", "text", "behaviour")


@dataclass(frozen=True, slots=True)
class Unit:
    """One thing that gets features.

    Attributes:
        kind: ``image``, ``audio``, ``video``, ``text`` or ``behaviour``.
        id: A medium's path below the media root, or ``sha256:`` of embedded bytes, a text or a history.
        where: Where the first row stood that shows it.
        medium: The pointer, of media.
        text: The text itself.
        items: The history itself, oldest first.
        size: Bytes of the file; characters of a text, items of a history.
        mtime_ns: When the file was written last; 0 of what is no file.
    """

    kind: FeatureKind
    id: str
    where: str
    medium: Medium | None = None
    text: str = ""
    items: tuple[str, ...] = ()
    size: int = 0
    mtime_ns: int = 0


@dataclass(frozen=True, slots=True)
class JointRow:
    """Units that a row shows together and that get one vector.

    Attributes:
        parts: Kind and id of each, in the order of the row.
        where: Where the first row stood that shows them.
        splits: The splits whose rows show them.
    """

    parts: tuple[tuple[FeatureKind, str], ...]
    where: str
    splits: tuple[str, ...]

    @property
    def id(self) -> str:
        """``sha256:`` of the parts."""
        return text_id("\n".join(f"{kind}/{name}" for kind, name in self.parts))


@dataclass(frozen=True)
class Gathered:
    """The distinct units of some sources.

    Attributes:
        units: By kind, in the order of their first use.
        splits: Kind and id to the splits that show it.
        read: Rows that were read.
        rejects: Rows that the readers refused, and media whose file is not there or unsafe.
        refused: Of the rejects, how many were rows.
        digest: Changes when units, files, splits or joint rows do.
        joint: What rows show together, every combination once, in the order of its first use.
    """

    units: Mapping[FeatureKind, Sequence[Unit]]
    splits: Mapping[tuple[FeatureKind, str], Sequence[str]]
    read: int
    rejects: Sequence[Reject]
    refused: int
    digest: str
    joint: Sequence[JointRow] = ()


def gather(
    items: Iterable[tuple[Record | Reject, MediaPlace]],
    media_root: str,
    kinds: Iterable[FeatureKind],
    together: Iterable[FeatureKind] = (),
) -> Gathered:
    """Returns the distinct units of what readers found; files are looked up, not opened.

    Args:
        items: Records or rejects, each with where its source's media lie.
        media_root: The folder above all media.
        kinds: What is wanted.
        together: Of them, those that get one vector per row besides.
    """
    wanted, joint = frozenset(kinds), _JointRows(together)
    found: dict[tuple[FeatureKind, str], Unit | None] = {}
    splits: dict[tuple[FeatureKind, str], list[str]] = {}
    rejects: list[Reject] = []
    read = refused = 0
    for item, place in items:
        read += 1
        if isinstance(item, Reject):
            rejects.append(item)
            refused += 1
            continue
        for unit in units_of(item, place):
            key = (unit.kind, unit.id)
            if unit.kind not in wanted:
                continue
            if key not in found:
                stood = _stand(unit, place, media_root)
                if isinstance(stood, Reject):
                    rejects.append(stood)
                found[key] = stood if isinstance(stood, Unit) else None
                splits[key] = []
            if item.split not in splits[key]:
                splits[key].append(item.split)
        joint.add(item, place)
    digest = hashlib.sha256()
    units: dict[FeatureKind, list[Unit]] = {}
    for key, one in found.items():
        if one is not None:
            units.setdefault(key[0], []).append(one)
            digest.update(json.dumps([key, one.size, one.mtime_ns, splits[key]]).encode("utf-8", "surrogatepass"))
    for reject in rejects:
        digest.update(json.dumps([reject.where, reject.id, reject.reason]).encode("utf-8", "surrogatepass"))
    together_rows = joint.rows()
    for row in together_rows:
        digest.update(json.dumps([row.parts, row.splits]).encode("utf-8", "surrogatepass"))
    ordered = {kind: units[kind] for kind in KINDS if kind in units}
    return Gathered(ordered, splits, read, rejects, refused, digest.hexdigest(), together_rows)


class _JointRows:
    """The distinct combinations of units that rows show together."""

    def __init__(self, kinds: Iterable[FeatureKind]) -> None:
        self._kinds = frozenset(kinds)
        self._found: dict[tuple[tuple[FeatureKind, str], ...], tuple[str, list[str]]] = {}

    def add(self, record: Record, place: MediaPlace) -> None:
        """Adds the units of a row.

        A chart is its picture and the table behind it, whatever is asked about it.
        """
        if not self._kinds:
            return
        asked = text_id(record.text) if record.task == "chart" else ""
        own = ((unit.kind, unit.id) for unit in units_of(record, place) if unit.kind != "text" or unit.id != asked)
        parts = tuple(part for part in own if part[0] in self._kinds)
        if parts:
            _, splits = self._found.setdefault(parts, (record.where, []))
            if record.split not in splits:
                splits.append(record.split)

    def rows(self) -> list[JointRow]:
        """Returns them in the order of their first use."""
        return [JointRow(parts, where, tuple(splits)) for parts, (where, splits) in self._found.items()]


def units_of(record: Record, place: MediaPlace) -> Iterator[Unit]:
    """Yields the units of one record; a medium's path is put below the common media root.

    The text is the question with its context, or what the user says in a conversation; a record of an answer alone is
    its answer. The context of a chart is the table behind it and stands for itself.
    """
    media = record.media or tuple(medium for message in record.messages for medium in message.media)
    for medium in media:
        if medium.modality == "behaviour":
            yield _history_unit(items_of(medium), record.where)
            continue
        path = place.prefixes.get(medium.modality, "") + medium.path if medium.path else ""
        name = path or text_id(medium.data or b"")
        yield Unit(medium.modality, name, record.where, medium=replace(medium, path=path))
    for text in _texts(record, bool(media)):
        yield Unit("text", text_id(text), record.where, text=text, size=len(text))
    if record.history is not None:
        yield _history_unit(record.history, record.where)


def _history_unit(items: tuple[str, ...], where: str) -> Unit:
    return Unit("behaviour", text_id("\n".join(items)), where, items=items, size=len(items))


def known_as(record: Record, place: MediaPlace) -> tuple[str, ...]:
    """Returns ``kind/id`` of what a record is in features/ besides its media: its text and history."""
    units = units_of(record, place)
    return tuple(f"{unit.kind}/{unit.id}" for unit in units if unit.medium is None)


def text_id(text: str | bytes) -> str:
    """Returns the id of a text, or of embedded bytes."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _texts(record: Record, has_media: bool) -> list[str]:
    if record.messages:
        said = (part.text for message in record.messages if message.role == "user" for part in message.parts
                if isinstance(part, TextPart))  # fmt: skip
        return [text for text in ["\n".join(said)] if text.strip()]
    if record.task == "chart" and record.context:
        parts = [record.text, record.context]
    else:
        parts = ["\n".join(part for part in (record.text, record.context) if part)]
    if not any(parts) and not has_media and record.history is None:
        parts = [record.target or next(iter(record.references), "")]
    return [text for text in parts if text.strip()]


def _stand(unit: Unit, place: MediaPlace, media_root: str) -> Unit | Reject:
    """Returns a unit with its file's size and time, or why its file cannot be used."""
    if unit.medium is None:
        return unit
    if unit.medium.data is not None:
        return replace(unit, size=len(unit.medium.data))
    try:
        # As the row says it: below the common root an address or an absolute path is but a name that is not there.
        check_relative(unit.medium.path.removeprefix(place.prefixes.get(unit.medium.modality, "")))
        stat = Path(resolve(media_root, unit.medium.path)).stat()
    except MediaRefused as refused:
        return Reject(unit.where, unit.id, refused.code, refused.message)
    except FileNotFoundError:
        return Reject(unit.where, unit.id, "media_missing", f"there is no {unit.id!r} below {Path(media_root).name!r}")
    except OSError as error:
        return Reject(unit.where, unit.id, "bad_path", f"{unit.id!r} cannot be opened: {os.strerror(error.errno or 0)}")
    return replace(unit, size=stat.st_size, mtime_ns=stat.st_mtime_ns)


def by_length(units: Sequence[Unit]) -> list[Unit]:
    """Returns units so that those of like length stand together and batches hold little padding."""
    return sorted(units, key=lambda unit: (unit.size, unit.id)) if units and _varies(units[0]) else list(units)


def _varies(unit: Unit) -> bool:
    return unit.kind in ("audio", "text", "behaviour")


def todo(
    units: Sequence[Unit], kept: Mapping[str, tuple[int, int, str]], digest: Callable[[Unit], str]
) -> tuple[list[Unit], int]:
    """Returns the units without features that still hold, and how many of them had features of another file.

    A file of the same size and time is taken as unchanged; one of the same size and another time is read to compare
    its sha256.

    Args:
        units: What is wanted.
        kept: Id to size, time and sha256 of what there are features of.
        digest: The sha256 of a unit's file.
    """
    missing, changed = [], 0
    for unit in units:
        known = kept.get(unit.id)
        if known is not None and known[0] == unit.size and (known[1] == unit.mtime_ns or known[2] == digest(unit)):
            continue
        missing.append(unit)
        changed += known is not None
    return missing, changed
