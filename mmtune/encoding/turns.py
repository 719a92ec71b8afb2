"""Shortening a conversation: by whole early turns, by exemplars, by the end of a context."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from mmtune.records import Message, TextPart


def without_first_turn(messages: Sequence[Message]) -> tuple[Message, ...] | None:
    """Returns the conversation without its first user turn and what answers it, or None.

    System turns stay. None means that one exchange is left, which is never cut.
    """
    head = [message for message in messages if message.role == "system"]
    rest = [message for message in messages if message.role != "system"]
    starts = [index for index, message in enumerate(rest) if message.role == "user"]
    later = [index for index in starts if index > 0 and rest[index - 1].role != "user"]
    if not later:
        return None
    return (*head, *rest[later[0] :])


def without_farthest(
    messages: Sequence[Message], ranks: Sequence[int]
) -> tuple[tuple[Message, ...], tuple[int, ...]] | None:
    """Returns the conversation and its ranks without the farthest exemplar, or None when none is left.

    Args:
        messages: An exemplar is what stands up to an answer that bears no loss.
        ranks: Of the exemplars in the order they stand; the largest is the farthest.
    """
    if not ranks:
        return None
    place = max(range(len(ranks)), key=lambda at: ranks[at])
    head = sum(message.role == "system" for message in messages)
    ends = [at + 1 for at, message in enumerate(messages) if message.role == "assistant" and not message.train]
    start = ends[place - 1] if place else head
    kept = (*messages[:start], *messages[ends[place] :])
    return kept, (*ranks[:place], *ranks[place + 1 :])


def context_words(messages: Sequence[Message], context: str) -> int:
    """Returns how many words of a context may stay where some must go: all but the last; 0 if it does not stand once.

    Args:
        messages: The last user turn says the context.
        context: As it stands there.
    """
    last = next((message for message in reversed(messages) if message.role == "user"), None)
    if not context or last is None:
        return 0
    times = sum(part.text.count(context) for part in last.parts if isinstance(part, TextPart))
    return max(len(context.split()) - 1, 0) if times == 1 else 0


def with_context(messages: Sequence[Message], context: str, words: int) -> tuple[Message, ...]:
    """Returns the conversation with the first words of its context.

    Args:
        messages: Of which ``context_words`` says that it can.
        context: As it stands in the last user turn.
        words: How many words stay.
    """
    ends = [match.end() for match in re.finditer(r"\S+", context)]
    kept = context[: ends[words - 1]]
    at = max(at for at, message in enumerate(messages) if message.role == "user")
    parts = tuple(
        TextPart(part.text.replace(context, kept)) if isinstance(part, TextPart) else part
        for part in messages[at].parts
    )
    return (*messages[:at], replace(messages[at], parts=parts), *messages[at + 1 :])
