"""A conversation encoded so that it fits, without whole early turns where that is wanted."""

from __future__ import annotations

from collections.abc import Sequence

from mmtune.encoding.refused import Refused
from mmtune.encoding.render import EncodedRow, Renderer
from mmtune.encoding.turns import without_first_turn
from mmtune.records import Message


def fit(
    renderer: Renderer, messages: Sequence[Message], tools: str, max_length: int, *, drop_turns: bool
) -> tuple[Sequence[Message], EncodedRow]:
    """Returns the turns that were kept, and their encoding.

    Args:
        renderer: Encodes a conversation.
        messages: The whole conversation.
        tools: JSON list of tool schemas, or empty.
        max_length: Most tokens, media included.
        drop_turns: Leave early turns out rather than refuse.

    Raises:
        Refused: It does not fit, or cannot be encoded at all.
    """
    while True:
        row = renderer.encode(messages, tools)
        if row.input_ids.size <= max_length:
            return messages, row
        shorter = without_first_turn(messages) if drop_turns else None
        if shorter is None:
            media = sum(span.length for span in row.media)
            reason = "media_too_long" if media >= max_length else "too_long"
            raise Refused(reason, f"{row.input_ids.size} tokens, {media} of them media; max_length is {max_length}")
        messages = shorter
