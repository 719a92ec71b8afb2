"""A conversation encoded so that it fits: without its farthest exemplars, and on request without whole early turns, or
without the end of its context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mmtune.encoding.refused import Refused
from mmtune.encoding.render import EncodedRow, Renderer
from mmtune.encoding.turns import context_words, with_context, without_farthest, without_first_turn
from mmtune.records import Message

Shown = Callable[[Sequence[Message]], Sequence[Message]]
"""A conversation to the one that is encoded, such as its exemplars to text of its question."""


def as_they_stand(messages: Sequence[Message]) -> Sequence[Message]:
    """Returns a conversation as it is."""
    return messages


@dataclass(frozen=True, slots=True)
class Fitted:
    """A conversation that fits.

    Attributes:
        messages: The turns that were kept, as they were given.
        row: Their encoding.
        ranks: Of the exemplars that were kept.
        dropped: Exemplars that were left out.
        context: What is left of the context; None where nothing was cut off it.
    """

    messages: Sequence[Message]
    row: EncodedRow
    ranks: tuple[int, ...] = ()
    dropped: int = 0
    context: str | None = None


def fit(
    renderer: Renderer,
    messages: Sequence[Message],
    tools: str,
    max_length: int,
    *,
    drop_turns: bool,
    ranks: Sequence[int] = (),
    context: str = "",
    shown: Shown = as_they_stand,
) -> Fitted:
    """Returns the turns that were kept, and their encoding.

    Args:
        renderer: Encodes a conversation.
        messages: The whole conversation.
        tools: JSON list of tool schemas, or empty.
        max_length: Most tokens, media included.
        drop_turns: Leave early turns out rather than refuse.
        ranks: Of the exemplars that the conversation begins with, 0 the nearest; the farthest are left out first.
        context: What the last user turn says that may lose its end, where nothing else makes it fit; empty for nothing.
        shown: The conversation to the one that is encoded.

    Raises:
        Refused: It does not fit, or cannot be encoded at all.
    """
    left = ranks
    while True:
        row = renderer.encode(shown(messages), tools)
        if row.input_ids.size <= max_length:
            return Fitted(messages, row, tuple(left), len(ranks) - len(left))
        fewer = without_farthest(messages, left)
        if fewer is not None:
            messages, left = fewer
            continue
        shorter = without_first_turn(messages) if drop_turns else None
        if shorter is None:
            found = _shortened(renderer, messages, tools, max_length, context, shown)
            if found is not None:
                return replace(found, dropped=len(ranks))
            media = sum(span.length for span in row.media)
            reason = "media_too_long" if media >= max_length else "too_long"
            raise Refused(reason, f"{row.input_ids.size} tokens, {media} of them media; max_length is {max_length}")
        messages = shorter


def _shortened(
    renderer: Renderer, messages: Sequence[Message], tools: str, max_length: int, context: str, shown: Shown
) -> Fitted | None:
    """Returns a conversation with as many first words of its context as fit; None where not even one does.

    Words and not tokens are cut, so that what is left is encoded as any text. More words are taken to be more tokens.
    """
    least, most, found = 1, context_words(messages, context), None
    while least <= most:
        words = (least + most) // 2
        shorter = with_context(messages, context, words)
        row = renderer.encode(shown(shorter), tools)
        if row.input_ids.size <= max_length:
            found = Fitted(shorter, row, context=" ".join(context.split()[:words]))
            least = words + 1
        else:
            most = words - 1
    return found
