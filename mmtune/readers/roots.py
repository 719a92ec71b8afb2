"""A source of a recipe, as plain values, to the files that its reader is given and the folders of its media."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmtune.errors import DataError, RecipeError
from mmtune.readers import find_reader, modalities_of, unread_keys
from mmtune.readers.source import SourceFiles
from mmtune.records import Modality

PATHS = ("path", "questions", "annotations", "images", "audios", "videos")
"""What of a source may be a path."""
_SAME = ("id", "split", "columns", "tasks", "name", "subset", "where")


def files_of(sources: Sequence[Mapping[str, Any]], seed: int, keep_fields: Sequence[bool] = ()) -> list[SourceFiles]:
    """Returns what the readers of a recipe's sources are given.

    Args:
        sources: The keys of each source in the recipe.
        seed: The recipe's.
        keep_fields: Per source, whether records keep the columns of their row; empty for none.

    Raises:
        RecipeError: There is no such reader, or a key of the source says nothing to it.
        DataError: A media folder is not there.
    """
    keep = keep_fields or [False] * len(sources)
    given = [_given(source, seed, own) for source, own in zip(sources, keep, strict=True)]
    folders = {(one["id"], os.path.realpath(one["path"])) for one in sources if _is_folder(one)}
    several = {name for name, count in Counter(name for name, _ in folders).items() if count > 1}
    return [
        replace(own, split_in_id=_is_folder(source) and own.id in several)
        for source, own in zip(sources, given, strict=True)
    ]


def _is_folder(source: Mapping[str, Any]) -> bool:
    return source["reader"] == "folder" and source["path"] is not None


def _given(source: Mapping[str, Any], seed: int, keep_fields: bool) -> SourceFiles:
    find_reader(source["reader"])
    if unread := unread_keys(source["reader"], source):
        raise RecipeError(
            f"source {source['id']!r}: the reader {source['reader']} reads no `{unread[0]}`",
            "leave it out, or choose another reader: mmtune keys sources",
            "unread_key",
        )
    paths: dict[str, Any] = {key: Path(source[key]) for key in PATHS if source[key] is not None}
    for key in ("images", "audios", "videos"):
        folder = paths.get(key)
        if folder is not None and not folder.is_dir():
            raise DataError(
                f"{folder} is no folder (`{key}` of source {source['id']!r})",
                "check the path; a relative one is relative to the recipe's folder",
                "file_missing",
            )
    same: dict[str, Any] = {key: source[key] for key in _SAME}
    return SourceFiles(**same, seed=seed, keep_fields=keep_fields, **paths)


def media_roots(reader: str, given: SourceFiles, run_dir: Path) -> dict[Modality, str]:
    """Returns the real folder of each kind of media that a source may show."""
    hub = reader == "hf" and not (given.path and given.path.exists()) and given.images is None
    return {kind: os.path.realpath(run_dir if hub else given.root(kind)) for kind in modalities_of(reader)}
