"""How the rows of every source are asked, from the recipe: tasks, templates, verbalizers."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path

from mmtune.errors import RecipeError
from mmtune.prompts.chunk import Asked
from mmtune.prompts.template import Wordings, check_task, template_names
from mmtune.prompts.template_file import load_templates
from mmtune.prompts.verbalizer import check_verbalizer
from mmtune.recipe import TEMPLATE_DRAWS, Build, Source
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
        raise RecipeError(
            f"source {source.id!r} names the unknown template {source.template!r}",
            f"{guess}templates: {', '.join(sorted(names))}",
            "unknown_template",
        )
    words = {label: (own,) if isinstance(own, str) else own for label, own in source.verbalizer.items()}
    check_verbalizer(source.id, words)
    first = (source.templates or build.templates) == "first"
    return Asked(Wordings("first" if first else "pool", source.template, templates), words or None, build.content_free)


def named(item: Record | Reject, task: str) -> Record | Reject:
    """Returns an item whose task is the one that its source names; a conversation stays what it is."""
    return replace(item, task=task) if isinstance(item, Record) and not item.messages else item
