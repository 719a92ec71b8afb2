"""Further wordings of a held-out row, kept beside the one that it is asked in, for an ensemble over templates.

What is kept is what ``make_example`` says under each template, so that a row in one of its wordings is the row that
this template alone would have built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from mmtune.prompts.forms import Render
from mmtune.prompts.template import Style, Wordings, choose_templates, make_example
from mmtune.records import Example, Medium, Message, Part, Record, marked, parts_of

WORDINGS = "wordings"
"""Metadata key of them, as JSON, and the setting of instructions/ that says which are kept."""
Kept = Literal["all"] | tuple[str, ...]
"""Every template that fits a row, or those of some names."""


@dataclass(frozen=True, slots=True)
class Wording:
    """One way of saying a row.

    Attributes:
        before: What stands before its media, marked.
        after: What stands behind them; all of it where there are none.
        options: In the order of the row's own.
        content_free: What it says of a text without content, or None.
    """

    before: str
    after: str
    options: tuple[str, ...]
    content_free: str | None = None


def wordings_text(
    record: Record,
    own: Example,
    kept: Kept,
    *,
    seed: int,
    wordings: Wordings,
    render: Render | None = None,
    empty: Record | None = None,
) -> str:
    """Returns the wordings of a row with options as JSON, by template; those that do not fit it are left out.

    Args:
        record: It.
        own: It, as it is asked.
        kept: Which templates.
        seed: As of ``make_example``.
        wordings: Of its source.
        render: Renders ``jinja`` templates.
        empty: The row without content, where content-free prompts are kept.
    """
    fit = choose_templates(record, seed=seed, wordings=replace(wordings, draw="first", name=None), style=Style())
    found: dict[str, Any] = {}
    for template in fit if kept == "all" else [one for name in kept for one in fit if one.id == name]:
        alone = replace(wordings, name=template.id)
        made = make_example(record, seed=seed, wordings=alone, render=render)
        if not isinstance(made, Example) or len(made.options) != len(own.options):
            continue
        before, after = _around_media(made)
        found[template.id] = {"before": before, "after": after, "options": list(made.options)}
        free = None if empty is None else make_example(empty, seed=seed, wordings=alone, render=render)
        if isinstance(free, Example):
            found[template.id]["content_free"] = "".join(_around_media(free))
    return json.dumps(found, ensure_ascii=False)


def names_kept(metadata: Mapping[str, str]) -> list[str]:
    """Returns the templates whose wordings the metadata of a row keep."""
    return list(json.loads(metadata.get(WORDINGS, "{}")))


def wordings_of(example: Example) -> dict[str, Wording]:
    """Returns the wordings that a row keeps, by template."""
    kept: Mapping[str, Any] = json.loads(example.metadata.get(WORDINGS, "{}"))
    return {name: Wording(**{**own, "options": tuple(own["options"])}) for name, own in kept.items()}


def worded(example: Example, name: str) -> Example:
    """Returns a row in one of its wordings.

    Raises:
        KeyError: It has none of that name.
    """
    wording = wordings_of(example)[name]
    at = max(at for at, message in enumerate(example.messages) if message.role == "user")
    media = example.messages[at].media
    parts: tuple[Part, ...] = (*parts_of(wording.before), *media, *parts_of(wording.after))
    words = dict(zip(example.options, wording.options, strict=True))
    last = tuple(_in_words(message, words) for message in example.messages[at + 1 :])
    metadata = {key: text for key, text in example.metadata.items() if key not in (WORDINGS, "content_free")}
    if wording.content_free is not None:
        metadata["content_free"] = wording.content_free
    return replace(
        example,
        messages=(*example.messages[:at], replace(example.messages[at], parts=parts), *last),
        references=tuple(words.get(text, text) for text in example.references),
        options=wording.options,
        template_id=name,
        metadata=metadata,
    )


def _around_media(made: Example) -> tuple[str, str]:
    parts = next((message.parts for message in reversed(made.messages) if message.role == "user"), ())
    places = [at for at, part in enumerate(parts) if isinstance(part, Medium)]
    if not places:
        return "", marked(parts)
    return marked(parts[: places[0]]), marked(parts[places[-1] + 1 :])


def _in_words(message: Message, words: Mapping[str, str]) -> Message:
    if message.role != "assistant" or message.text not in words:
        return message
    return replace(message, parts=parts_of(words[message.text]))
