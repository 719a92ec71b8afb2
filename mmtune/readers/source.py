"""What a reader is given, and the one way a row is refused."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmtune.errors import DataError, RecipeError
from mmtune.readers.wanted import Wanted, wanted_rows
from mmtune.records import Modality, Record, Reject

ColumnMap = Mapping[str, str | int | list[str | int]]


@dataclass(frozen=True, slots=True)
class SourceFiles:
    """The files and choices of one raw dataset, paths absolute.

    Attributes:
        id: First part of every record's id.
        split: ``train``, ``val`` or ``test``.
        path: File or folder of single-file readers; a hub id for ``hf``.
        questions: Questions file of ``vqa_v2``.
        annotations: Annotation file of ``vqa_v2`` and the COCO readers.
        images: Folder that image paths are relative to.
        audios: Folder that audio paths are relative to.
        videos: Folder that video paths are relative to.
        columns: Our name to the file's column name, index or template.
        tasks: Keep only these tasks of a reader that makes several; empty keeps all.
        name: Configuration of a hub dataset.
        subset: The split to read of a hub dataset.
        where: Column to the value, or values, that a row must hold to be read; empty reads all.
        seed: For readers that draw (the negatives of ``coco_instances``).
        keep_fields: Keep the columns of a raw row for templates that name them.
        split_in_id: Files of other folders may have the same names: the split stands before a file's name in its id.
    """

    id: str
    split: str
    path: Path | None = None
    questions: Path | None = None
    annotations: Path | None = None
    images: Path | None = None
    audios: Path | None = None
    videos: Path | None = None
    columns: ColumnMap = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    name: str | None = None
    subset: str | None = None
    where: Wanted = field(default_factory=dict)
    seed: int = 0
    keep_fields: bool = False
    split_in_id: bool = False

    def file(self, key: str) -> Path:
        """Returns an input that the reader cannot do without.

        Raises:
            RecipeError: The recipe does not name it.
            DataError: It is not there.
        """
        path: Path | None = getattr(self, key)
        if path is None:
            raise RecipeError(f"source {self.id!r} needs `{key}`", f"add `{key}: <file>` to that source", "missing_key")
        if not path.exists():
            raise DataError(
                f"{path} is not there (`{key}` of source {self.id!r})",
                "check the path; a relative one is relative to the recipe's folder",
                "file_missing",
            )
        return path

    def root(self, modality: Modality) -> Path:
        """Returns the folder that this modality's paths are relative to."""
        named = {"image": self.images, "audio": self.audios, "video": self.videos}[modality]
        if named is not None:
            return named
        for path in (self.path, self.annotations, self.questions):
            if path is not None:
                return path if path.is_dir() else path.parent
        return Path.cwd()

    def own_id(self, name: str) -> str:
        """Returns the id of a record that has a name of its own."""
        return f"{self.id}/{unicodedata.normalize('NFC', name)}"

    def row_id(self, index: int) -> str:
        """Returns the id of a record that has none: its place in the file."""
        return f"{self.id}/{self.split}-{index}"

    def wants(self, task: str) -> bool:
        """Says whether records of a task are asked for."""
        return not self.tasks or task in self.tasks


def is_utf8(name: str) -> bool:
    """Says whether a name of the file system is text: bytes that are no UTF-8 stand in it as half surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


class Refused(Exception):
    """Raised inside a reader for one row; becomes a Reject, never reaches a caller."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Row:
    """One raw item of a file.

    Attributes:
        where: ``file:line`` or ``file#index``.
        index: Its place among the items, blank lines not counted.
        value: What was parsed.
    """

    where: str
    index: int
    value: Any


def read_rows(
    rows: Iterable[Row | Reject],
    make: Callable[[Row], Iterable[Record]],
    *,
    source: SourceFiles,
    what: Path | None = None,
    id_column: str = "",
) -> Iterator[Record | Reject]:
    """Yields the records of each row, or its Reject when ``make`` refuses it.

    Args:
        rows: What was parsed, and what could not be.
        make: Row to records.
        source: Whose rows they are.
        what: Where they come from, if not ``source.path``.
        id_column: Where a row has its id if ``columns`` does not say.

    Raises:
        DataError: There was no row at all (``empty_input``), or none that ``where`` wants (``none_wanted``).
    """
    if source.where:
        rows = wanted_rows(rows, source.where, source.id, what or source.path)
    empty = True
    for row in rows:
        empty = False
        if isinstance(row, Reject):
            yield row
            continue
        try:
            yield from make(row)
        except Refused as refused:
            yield Reject(row.where, _refused_id(source, row, id_column), refused.reason, refused.detail)
    if empty:
        raise DataError(
            f"{what or source.path} holds no rows", "check the file; an empty source is never skipped", "empty_input"
        )


def _refused_id(source: SourceFiles, row: Row, id_column: str) -> str:
    """Returns the id that a refused row would have had, as far as one can be read."""
    column = source.columns.get("id", id_column)
    own = row.value.get(column) if isinstance(row.value, Mapping) else None
    plain = isinstance(own, str | int) and not isinstance(own, bool) and own != ""
    return source.own_id(str(own)) if plain else source.row_id(row.index)
