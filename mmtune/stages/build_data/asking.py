"""How the rows of every source are asked, from the recipe: tasks, templates, verbalizers."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path

from mmtune.errors import RecipeError
from mmtune.prompts.chunk import Asked
from mmtune.prompts.template import OF_OPTIONS, POOLS, Wordings, check_task, template_names
from mmtune.prompts.template_file import load_templates
from mmtune.prompts.verbalizer import check_verbalizer
from mmtune.prompts.wordings import Kept
from mmtune.recipe import TEMPLATE_DRAWS, Build, Recipe, Source
from mmtune.records import Record, Reject


def template_file(source: Source, build: Build) -> Path | None:
    """Returns the template file of a source, or None when its templates are the shipped ones."""
    value = source.templates or build.templates
    return None if value in TEMPLATE_DRAWS else Path(value)


def asked_of(source: Source, build: Build) -> Asked:
    """Returns how the rows of a source are asked.

    Raises:
        RecipeError: Its task or template is unknown, or its verbalizer is wrong.
        DataError: Its template file is none.
    """
    for task in (*source.tasks, *((source.task,) if source.task else ())):
        check_task(task)
    file = template_file(source, build)
    templates = () if file is None else load_templates(file)
    names = template_names(templates)
    if source.template is not None and source.template not in names:
        near = difflib.get_close_matches(source.template, names, 1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        pool = {} if file or source.task is None else {one.id: one for one in POOLS.get(source.task, ())}
        what = f"templates of {source.task}" if pool else "templates"
        raise RecipeError(
            f"source {source.id!r} names the unknown template {source.template!r}",
            f"{guess}{what}: {', '.join(sorted(pool or names))}",
            "unknown_template",
        )
    words = {label: (own,) if isinstance(own, str) else own for label, own in source.verbalizer.items()}
    check_verbalizer(source.id, words)
    first = (source.templates or build.templates) == "first"
    return Asked(Wordings("first" if first else "pool", source.template, templates), words or None, build.content_free)


def all_asked(recipe: Recipe) -> tuple[Asked, ...]:
    """Returns how the rows of every source are asked, with the wordings that an ensemble of eval wants kept.

    Raises:
        RecipeError: As ``asked_of``, or ``eval.ensemble.wordings`` names a template that no held-out source has.
        DataError: As ``asked_of``.
    """
    further = further_wordings(recipe)
    found = [asked_of(source, recipe.build) for source in recipe.sources]
    held_out = [one for one, source in zip(found, recipe.sources, strict=True) if source.split != "train"]
    known = {name: None for one in held_out for name in template_names(one.wordings.file)}
    for name in further if isinstance(further, tuple) and held_out else ():
        if name not in known:
            some = sorted(_for_options(recipe) & known.keys() or known)
            near = difflib.get_close_matches(name, known, 3)
            guess = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise RecipeError(
                f"eval.ensemble.wordings names the unknown template {name!r}",
                f"{guess}take all, or some of: {', '.join(some)}",
                "unknown_template",
            )
    return tuple(replace(one, further=further) for one in found)


def _for_options(recipe: Recipe) -> set[str]:
    """Returns the shipped templates of rows with options, of the sources' tasks."""
    tasks = [source.task for source in recipe.sources]
    pools = [pool for task in tasks for pool in ([task] if task in OF_OPTIONS else ["choice", "label_options"])]
    return {template.id for pool in pools for template in POOLS[pool]}


def further_wordings(recipe: Recipe) -> Kept:
    """Returns the templates whose wordings held-out rows keep, see ``eval.ensemble.wordings``."""
    return recipe.eval.ensemble.wordings if recipe.eval is not None and recipe.eval.ensemble is not None else ()


def named(item: Record | Reject, task: str) -> Record | Reject:
    """Returns an item whose task is the one that its source names; a conversation stays what it is."""
    return replace(item, task=task) if isinstance(item, Record) and not item.messages else item
