"""Shortening a conversation by whole early turns."""

from __future__ import annotations

from collections.abc import Sequence

from mmtune.records import Message


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
