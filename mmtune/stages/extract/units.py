"""The sources of a recipe to the units that get features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from mmtune.errors import DataError, RecipeError
from mmtune.features.units import KINDS, Gathered, gather
from mmtune.media.known import MediaPlace, media_places
from mmtune.readers import Reader, find_reader
from mmtune.readers.limit import part, take
from mmtune.readers.roots import files_of, media_roots
from mmtune.readers.source import SourceFiles
from mmtune.recipe import Extract, Recipe
from mmtune.records import Record, Reject


def gather_units(recipe: Recipe, settings: Extract, limit: int | None) -> tuple[Gathered, str]:
    """Returns the units of all sources, and the folder above their media.

    Raises:
        RecipeError: There are no sources, or one is incomplete.
        DataError: A file is missing, or the sources hold nothing of what is wanted.
    """
    if not recipe.sources:
        raise RecipeError("the recipe has no sources", "add `sources:` with at least one dataset", "no_sources")
    files = files_of([source.model_dump() for source in recipe.sources], recipe.seed)
    roots = [
        media_roots(source.reader, given, Path(recipe.run_dir))
        for source, given in zip(recipe.sources, files, strict=True)
    ]
    media_root, places = media_places(roots)

    def items() -> Iterator[tuple[Record | Reject, MediaPlace]]:
        for source, given, place in zip(recipe.sources, files, places, strict=True):
            read = find_reader(source.reader)
            caps = [cap for cap in (source.limit, limit) if cap is not None]
            for item in take(partial(_of_part, read, given, source.part), min(caps) if caps else None):
                yield _named(item, source.task), place

    kinds = settings.modalities or KINDS
    gathered = gather(items(), media_root, kinds, settings.joint)
    named = dict.fromkeys((*settings.modalities, *settings.joint, *settings.twins))
    missing = [kind for kind in named if kind not in gathered.units]
    if missing or not gathered.units:
        what = " and ".join(missing) or "anything that could have features"
        # A note beside the pictures of a folder is no reason why something else is not there.
        refused = next((one for one in gathered.rejects if one.reason != "not_media"), None)
        first = f"; the first refused at {refused.where}: {refused.detail}" if refused else ""
        raise DataError(
            f"the sources hold no {what}{first}", "check sources, extract.modalities, joint and twins", "no_units"
        )
    return gathered, media_root


def _of_part(read: Reader, given: SourceFiles, bounds: tuple[float, float]) -> Iterator[Record | Reject]:
    return part(read(given), *bounds)


def _named(item: Record | Reject, task: str | None) -> Record | Reject:
    return replace(item, task=task) if task and isinstance(item, Record) and not item.messages else item
