"""Finished rows shown before another finished row: what a training row shows of itself, and how they are joined."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from mmtune.media.content import own_name
from mmtune.prompts.exemplars import Order, bare_id, shown_ranks
from mmtune.prompts.retrieval import Card
from mmtune.prompts.template import template_names
from mmtune.records import Example, Medium, Message


def exchange(example: Example) -> tuple[Message, ...]:
    """Returns the question and answer that a row teaches, bearing no loss; not what stands before them.

    Nothing where it is no exemplar, see ``unfit``.
    """
    if unfit(example):
        return ()
    turns = [replace(example.messages[-1], train=False)]
    for message in reversed(example.messages[:-1]):
        if message.role != "user":
            break
        turns.append(message)
    return tuple(reversed(turns))


def unfit(example: Example) -> str:
    """Returns why a row is no exemplar; empty where it is one."""
    last = example.messages[-1] if example.messages else None
    template = template_names().get(example.template_id)
    if last is None or last.role != "assistant" or not last.text:
        return "without an answer"
    if not example.template_id:
        return "a conversation as it was read, no question worded by a template"
    if template is not None and template.inverted:
        return "asked the other way round"
    return "reasons before it answers" if example.references and last.text not in example.references else ""


def card_of(example: Example, name: Callable[[Medium], str] = own_name) -> Card:
    """Returns what decides whether a row may be shown before another one, or another one before it.

    Args:
        example: The row.
        name: Medium to a name that equal media share.
    """
    media = tuple(name(medium) for medium in own_media(example))
    text = "" if media else next((name for name in example.feature_ids if name.startswith("text/")), "")
    answer = example.messages[-1].text if example.messages and example.messages[-1].role == "assistant" else ""
    return Card(bare_id(example.id), example.source, media, text, answer)


def own_media(example: Example) -> tuple[Medium, ...]:
    """Returns the media of a row's own question; those of its exemplars stand before them."""
    shown = [at for at, message in enumerate(example.messages) if message.role == "assistant" and not message.train]
    start = shown[len(example.exemplar_ids) - 1] + 1 if example.exemplar_ids else 0
    return tuple(medium for message in example.messages[start:] for medium in message.media)


def name_of(medium: Medium) -> str:
    """Returns the name of a medium in features/: its path, or the sha256 of its bytes where it has none."""
    return medium.path or f"sha256:{hashlib.sha256(medium.data or b'').hexdigest()}"


def with_shots(example: Example, exemplars: Sequence[Example], order: Order, salt: str) -> Example:
    """Returns a row with exemplars before its question.

    Args:
        example: A row that is asked; what it shows already stays.
        exemplars: Nearest first, each with an ``exchange``.
        order: How they stand.
        salt: Of a random order.
    """
    head = tuple(message for message in example.messages if message.role == "system")
    rest = tuple(message for message in example.messages if message.role != "system")
    shown = [exemplars[rank] for rank in shown_ranks(order, len(exemplars), salt)]
    turns = tuple(message for one in shown for message in exchange(one))
    return replace(example, messages=(*head, *turns, *rest), exemplar_ids=tuple(one.id for one in shown))
