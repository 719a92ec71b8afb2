r"""A folder of labelled images, sounds or clips.

ImageFolder layout, the folder's name is the label::

    clothing/train/dress/02e5eb57-....jpg
    clothing/train/t-shirt/0fd8f6d7-....jpg

or a pattern that finds the label in the relative path
(``columns: {label: '(?P<label>\d)_(?P<speaker>[a-z]+)_'}``)::

    recordings/0_george_0.wav
    recordings/7_jackson_12.wav

The label is the group ``label``, else the first group; other named groups become metadata.
``columns: {keep: pattern}`` reads only the files whose path fits. The labels found are the
options, when there are at most 200. Hidden files are passed over.

A record's id is ``source/path``; where sources of one id read several folders, whose files may
have the same names, it is ``source/split/path``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mmtune.errors import DataError, RecipeError
from mmtune.readers.source import SourceFiles, is_utf8
from mmtune.records import Medium, Modality, Record, Reject

SUFFIXES: dict[str, Modality] = {
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"), "image"),
    **dict.fromkeys((".wav", ".flac", ".mp3", ".ogg"), "audio"),
    **dict.fromkeys((".mp4", ".avi", ".mkv", ".mov", ".webm"), "video"),
}
_MOST_OPTIONS = 200


def read_folder(source: SourceFiles) -> Iterator[Record | Reject]:
    """Yields one record per file, in the order of the paths.

    Raises:
        RecipeError: A pattern is not a regular expression, or has no group.
        DataError: The folder is missing or holds no media.
    """
    top = source.file("path")
    if not top.is_dir():
        raise DataError(f"{top} is not a folder", "give the folder that holds the classes", "file_missing")
    label, keep = _pattern(source, "label"), _pattern(source, "keep")
    labels = {found[0] for path in _files(top, keep) if is_utf8(path) and (found := _label(path, label)) is not None}
    options = tuple(sorted(labels)) if len(labels) <= _MOST_OPTIONS else ()
    empty = True
    for path in _files(top, keep):
        empty = False
        yield _record(source, path, _label(path, label), options)
    if empty:
        raise DataError(f"{top} holds no files", "give the folder that holds the classes", "empty_input")


def _record(
    source: SourceFiles, path: str, found: tuple[str, dict[str, str]] | None, options: tuple[str, ...]
) -> Record | Reject:
    own = f"{source.id}/{source.split}/{path}" if source.split_in_id else f"{source.id}/{path}"
    if not is_utf8(path):
        return Reject(path, own, "bad_unicode", "the file's name is not UTF-8")
    modality = SUFFIXES.get(Path(path).suffix.lower())
    if modality is None:
        return Reject(path, own, "not_media", "not the name of an image, sound or video")
    if found is None or not found[0].strip():
        return Reject(
            path, own, "no_label", "no label in its path: neither a folder of its own nor columns.label names one"
        )
    return Record(
        id=own,
        source=source.id,
        task="label",
        split=source.split,
        media=(Medium(modality, _from_root(source, modality, path)),),
        references=(found[0].strip(),),
        options=options,
        metadata=found[1],
        where=path,
    )


def _from_root(source: SourceFiles, modality: Modality, path: str) -> str:
    root, top = source.root(modality), source.file("path")
    return path if root == top else Path(os.path.relpath(top / path, root)).as_posix()


def _label(path: str, pattern: re.Pattern[str] | None) -> tuple[str, dict[str, str]] | None:
    if pattern is None:
        parts = path.split("/")
        return (parts[-2], {}) if len(parts) > 1 else None
    match = pattern.search(path)
    if match is None:
        return None
    named = {key: value for key, value in match.groupdict().items() if value is not None}
    return named.pop("label", None) or match.group(1) or "", named


def _pattern(source: SourceFiles, key: str) -> re.Pattern[str] | None:
    text = source.columns.get(key)
    if text is None:
        return None
    try:
        pattern = re.compile(str(text))
    except re.error as error:
        raise RecipeError(
            f"source {source.id!r}: columns.{key} is no regular expression: {error}",
            "mend it; the letters of Python's `re` are read",
        ) from error
    if key == "label" and not pattern.groups:
        raise RecipeError(
            f"source {source.id!r}: columns.label has no group", "put the label in parentheses: '([a-z]+)_'"
        )
    return pattern


def _files(top: Path, keep: re.Pattern[str] | None) -> Iterator[str]:
    """Yields relative paths in sorted order; symbolic links to folders are not followed."""
    for folder, names, files in os.walk(top):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name).relative_to(top).as_posix()
            if not name.startswith(".") and (keep is None or keep.search(path)):
                yield path
