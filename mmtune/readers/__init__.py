"""Annotation files to Records: one module per format, each beginning with a true excerpt."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module

from mmtune.errors import RecipeError
from mmtune.readers.source import SourceFiles
from mmtune.records import IN_FILES, Modality, Record, Reject

Reader = Callable[[SourceFiles], Iterator[Record | Reject]]

READERS: dict[str, str] = {
    "alpaca": "alpaca:read_alpaca",
    "chartqa": "chartqa:read_chartqa",
    "coco_captions": "coco_captions:read_coco_captions",
    "coco_instances": "coco_instances:read_coco_instances",
    "conll": "conll:read_conll",
    "flickr30k": "flickr30k:read_flickr30k",
    "folder": "folder:read_folder",
    "hf": "hf:read_hf",
    "llava": "llava:read_llava",
    "messages": "messages:read_messages",
    "rt_polarity": "rt_polarity:read_rt_polarity",
    "sharegpt": "sharegpt:read_sharegpt",
    "squad": "squad:read_squad",
    "t0": "t0:read_t0",
    "table": "table:read_table",
    "tweeteval": "tweeteval:read_tweeteval",
    "vqa_v2": "vqa_v2:read_vqa_v2",
}
"""Reader name to ``module:function``; a module is imported when a recipe uses it."""

_OFFICIAL: dict[str, tuple[str, ...]] = {
    "coco_captions": ("annotations",),
    "coco_instances": ("annotations",),
    "vqa_v2": ("questions", "annotations"),
}
"""The files of readers that take no ``path``."""
_WITH_COLUMNS = ("alpaca", "folder", "hf", "llava", "messages", "sharegpt", "table")
_IMAGES_ONLY = ("chartqa", "coco_captions", "coco_instances", "flickr30k", "vqa_v2")


def modalities_of(name: str) -> tuple[Modality, ...]:
    """Returns the kinds of files that a reader's rows can name."""
    return ("image",) if name in _IMAGES_ONLY else IN_FILES


def unread_keys(name: str, given: Mapping[str, object]) -> list[str]:
    """Returns the keys of a source that are given and that its reader would pass over.

    Args:
        name: The reader.
        given: Keys of the source to their values; empty ones are not given.
    """
    read = _OFFICIAL.get(name, ("path",))
    read += ("columns",) if name in _WITH_COLUMNS else ()
    read += ("where",) if name in _WITH_COLUMNS and name != "folder" else ()
    read += ("name", "subset") if name == "hf" else ()
    return [
        key
        for key in ("path", "questions", "annotations", "columns", "where", "name", "subset")
        if given.get(key) and key not in read
    ]


def find_reader(name: str) -> Reader:
    """Returns the reader of a format.

    Raises:
        RecipeError: There is no such reader.
    """
    if name not in READERS:
        near = difflib.get_close_matches(name, READERS, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise RecipeError(
            f"there is no reader {name!r}", f"{guess}readers: {', '.join(sorted(READERS))}", "unknown_reader"
        )
    module, function = READERS[name].split(":")
    reader: Reader = getattr(import_module(f"mmtune.readers.{module}"), function)
    return reader
