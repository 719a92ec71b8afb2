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
