"""The control text around a conversation's texts, rendered once per structure.

The family's own template is rendered with every text replaced by a sentinel; what stands
between the sentinels is structure. Leading and trailing whitespace stays outside the
sentinel, so a template that trims sees what it would see in the real text. The rendering
depends on the structure alone, hence one rendering serves all rows of the same shape.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmtune.encoding.refused import Refused
from mmtune.encoding.refused import Refused
from mmtune.errors import RecipeError
from mmtune.records import Medium, Message, TextPart


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of a skeleton: control text (``slot`` is -1) or the place of a text.

    Attributes:
        text: The control text; empty for a slot.
        slot: Index of the text that goes here, or -1.
        message: For a slot, the index of its message.
        loss: Whether the run belongs to a trained assistant turn.
    """

    text: str
    slot: int
    message: int
    loss: bool


@dataclass(frozen=True, slots=True)
class Shape:
    """A conversation's structure, and its texts.

    Attributes:
        key: Hashable structure; equal keys render alike.
        texts: Cores of the non-empty texts, in order of the slots.
        owners: Message index of each text.
    """

    key: tuple[Any, ...]
    texts: tuple[str, ...]
    owners: tuple[int, ...]


def shape_of(messages: Sequence[Message], tools: str) -> Shape:
    """Returns the structure of a conversation apart from its texts."""
    texts: list[str] = []
    owners: list[int] = []
    key: list[Any] = [tools]

    def slot(text: str, message: int) -> tuple[str, str, bool]:
        core = text.strip()
        if not core:
            return (text, "", False)
        start = text.index(core)
        texts.append(core)
        owners.append(message)
        return (text[:start], text[start + len(core) :], True)

    for index, message in enumerate(messages):
        reasoning = slot(message.reasoning, index)
        parts = tuple(
            slot(part.text, index) if isinstance(part, TextPart) else part.modality for part in message.parts
        )
        calls = tuple((call.name, call.arguments) for call in message.tool_calls)
        key.append((message.role, reasoning, parts, calls, message.name, message.train))
    return Shape(tuple(key), tuple(texts), tuple(owners))


class SkeletonMaker:
    """Renders skeletons with a compiled, sandboxed template.

    Args:
        template: Text of the chat template.
        variables: Further variables of the template (special tokens).
        flat_content: Give text-only messages as plain strings, as text models' templates expect.
    """

    def __init__(self, template: str, variables: dict[str, Any], flat_content: bool) -> None:
        self._template, self._variables, self._flat = template, variables, flat_content
        self._nonce = secrets.token_hex(4)
        self._pattern = re.compile(rf"mq{self._nonce}n(\d{{5}})qm")

    def _mark(self, slot: int) -> str:
        return f"mq{self._nonce}n{slot:05d}qm"

    def pieces(self, messages: Sequence[Message], tools: str, generation_prompt: bool) -> list[Piece]:
        """Returns the runs of the rendered conversation, in order.

        Raises:
            Refused: A text did not come through whole, exactly once and in order.
            RecipeError: The template itself raises an error.
        """
        plain, owners = self._plain(messages)
        whole = self._render(plain, tools, generation_prompt)
        regions = []
        for index, message in enumerate(messages):
            if message.role == "assistant" and message.train:
                regions.append(self._region(plain, tools, index, whole, owners))
        return self._cut(whole, regions, owners)

    def _plain(self, messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[int]]:
        owners: list[int] = []

        def mark(text: str, message: int) -> str:
            core = text.strip()
            if not core:
                return text
            owners.append(message)
            start = text.index(core)
            return text[:start] + self._mark(len(owners) - 1) + text[start + len(core) :]

        out: list[dict[str, Any]] = []
        for index, message in enumerate(messages):
            plain: dict[str, Any] = {"role": message.role}
            if message.reasoning:
                plain["reasoning_content"] = mark(message.reasoning, index)
            parts = [
                {"type": "text", "text": mark(part.text, index)}
                if isinstance(part, TextPart)
                else {"type": part.modality}
                for part in message.parts
            ]
            only_text = all(part["type"] == "text" for part in parts)
            plain["content"] = "".join(part["text"] for part in parts) if self._flat and only_text else parts
            if message.tool_calls:
                plain["tool_calls"] = [
                    {"type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
                    for call in message.tool_calls
                ]
            if message.name:
                plain["name"] = message.name
            out.append(plain)
        return out, owners

    def _render(self, plain: list[dict[str, Any]], tools: str, generation_prompt: bool) -> str:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                conversations=[plain],
                tools=json.loads(tools) if tools else None,
                chat_template=self._template,
                add_generation_prompt=generation_prompt,
                **self._variables,
            )
        except jinja2.TemplateError as error:
            raise Refused("template_refused", f"the chat template refuses this conversation: {error.message or error}") from error
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise Refused("template_refused", f"the chat template fails on this conversation: {error}") from error
        if not isinstance(rendered[0], str):
            raise RecipeError("the chat template did not return text", "use another chat template")
        return rendered[0]

    def _region(
        self, plain: list[dict[str, Any]], tools: str, index: int, whole: str, owners: list[int]
    ) -> tuple[int, int]:
        """Returns the characters of an assistant turn that the model itself must produce.

        It begins where the generation prompt ends and ends with the turn's last token, both
        taken from renderings of the shorter conversation wherever these are its prefixes.
        """
        marks = [whole.find(self._mark(slot)) for slot, owner in enumerate(owners) if owner == index]
        marks = [place for place in marks if place >= 0]
        length = len(self._mark(0))
        begin = min(marks) if marks else -1
        end = max(marks) + length if marks else -1
        try:
            opened = self._render(plain[:index], tools, True) if index else ""
            closed = self._render(plain[: index + 1], tools, False).rstrip()
        except Refused:
            opened = closed = ""
        if opened and whole.startswith(opened) and (begin < 0 or len(opened) <= begin):
            begin = len(opened)
        if closed and whole.startswith(closed) and len(closed) >= end:
            end = len(closed)
        return (begin, end) if begin >= 0 else (0, 0)

    def _cut(self, whole: str, regions: list[tuple[int, int]], owners: list[int]) -> list[Piece]:
        found = list(self._pattern.finditer(whole))
        if [int(match.group(1)) for match in found] != list(range(len(owners))):
            raise Refused("template_refused", "the chat template drops, doubles or reorders a text of this conversation")
        pieces: list[Piece] = []
        at = 0
        for match in found:
            pieces += self._control(whole, at, match.start(), regions)
            slot = int(match.group(1))
            inside = any(begin <= match.start() < end for begin, end in regions)
            pieces.append(Piece("", slot, owners[slot], inside))
            at = match.end()
        return pieces + self._control(whole, at, len(whole), regions)

    def _control(self, whole: str, start: int, end: int, regions: list[tuple[int, int]]) -> list[Piece]:
        edges = sorted({start, end, *(edge for region in regions for edge in region if start < edge < end)})
        return [
            Piece(whole[a:b], -1, -1, any(begin <= a and b <= stop for begin, stop in regions))
            for a, b in zip(edges[:-1], edges[1:], strict=True)
            if b > a
        ]


def media_of(messages: Sequence[Message]) -> list[Medium]:
    """Returns the media of a conversation in reading order."""
    return [part for message in messages for part in message.parts if isinstance(part, Medium)]
