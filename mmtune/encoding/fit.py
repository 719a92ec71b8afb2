"""A conversation encoded so that it fits: without its farthest exemplars, and without whole early turns on request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmtune.encoding.refused import Refused
from mmtune.encoding.render import EncodedRow, Renderer
from mmtune.encoding.turns import without_farthest, without_first_turn
from mmtune.records import Message


@dataclass(frozen=True, slots=True)
class Fitted:
    """A conversation that fits.

    Attributes:
        messages: The turns that were kept.
        row: Their encoding.
        ranks: Of the exemplars that were kept.
        dropped: Exemplars that were left out.
    """

    messages: Sequence[Message]
    row: EncodedRow
    ranks: tuple[int, ...] = ()
    dropped: int = 0


def fit(
    renderer: Renderer,
    messages: Sequence[Message],
    tools: str,
    max_length: int,
    *,
    drop_turns: bool,
    ranks: Sequence[int] = (),
) -> Fitted:
    """Returns the turns that were kept, and their encoding.

    Args:
        renderer: Encodes a conversation.
        messages: The whole conversation.
        tools: JSON list of tool schemas, or empty.
        max_length: Most tokens, media included.
        drop_turns: Leave early turns out rather than refuse.
        ranks: Of the exemplars that the conversation begins with, 0 the nearest; the farthest are left out first.

    Raises:
        Refused: It does not fit, or cannot be encoded at all.
    """
    left = ranks
    while True:
        row = renderer.encode(messages, tools)
        if row.input_ids.size <= max_length:
            return Fitted(messages, row, tuple(left), len(ranks) - len(left))
        fewer = without_farthest(messages, left)
        if fewer is not None:
            messages, left = fewer
            continue
        shorter = without_first_turn(messages) if drop_turns else None
        if shorter is None:
            media = sum(span.length for span in row.media)
            reason = "media_too_long" if media >= max_length else "too_long"
            raise Refused(reason, f"{row.input_ids.size} tokens, {media} of them media; max_length is {max_length}")
        messages = shorter
