"""Chat messages with typed content parts, as Hugging Face, OpenAI and LLaMA-Factory v1 write them.

One JSON object per line (or a JSON array of them)::

    {"messages": [{"role": "user", "content": [
                     {"type": "image_url", "value": "data/mllm_demo_data/1.jpg"},
                     {"type": "text", "value": "Who are they?"}]},
                  {"role": "assistant", "content": [
                     {"type": "text", "value": "They're Kane and Gretzka from Bayern Munich."}],
                   "loss_weight": 1.0}]}

A part is text (``text`` or ``value``), an image (``{"type": "image", "image"|"path"|"url": ...}``
or ``{"type": "image_url", "image_url": {"url": ...}}``), ``input_audio``, ``audio``, ``video``,
``behaviour`` (a user's history, ``{"type": "behaviour", "behaviour": ["318", "50"]}``), ``reasoning`` or
``tool_call``. A part that names no file takes the next of the row's ``images``, ``audios``, ``videos`` or
``histories``. Content may be a plain string, whose ``<image>`` is just text; where no turn marks a place for the
row's ``images``, they stand before the user's first words, as with TRL. An answer whose ``train``, ``loss``,
``weight``, ``loss_weight`` or ``loss_scale`` is 0 or false bears no loss.
A pair of ``chosen_messages`` and ``rejected_messages`` is read as its chosen conversation, and TRL's rows
(``prompt`` with ``chosen`` or ``completion``, or ``chosen`` alone) as the conversation that they prefer::

    {"prompt": [{"role": "user", "content": "What color is the sky?"}],
     "chosen": [{"role": "assistant", "content": "It is blue."}],
     "rejected": [{"role": "assistant", "content": "It is green."}]}
    {"prompt": "What color is the sky?", "completion": "It is blue."}

A row with ``label: false`` (KTO) is refused as ``not_preferred``.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmtune.readers.conversation import (
    PLACEHOLDER,
    conversation,
    is_taught,
    media_columns,
    role_of,
    row_metadata,
    taught_turns,
    tool_calls_of,
    tools_text,
)
from mmtune.readers.fields import as_object, as_text, kind, media_of, wrong
from mmtune.readers.histories import history_items
from mmtune.readers.source import Refused, Row, SourceFiles, read_rows
from mmtune.readers.strict_json import iter_items
from mmtune.records import MODALITIES, Medium, Message, Modality, Part, Record, Reject, TextPart, ToolCall, history

_PART_MODALITY: dict[str, Modality] = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
    "video": "video",
    "video_url": "video",
    "behaviour": "behaviour",
}
_TEXT_TYPES = ("text", "input_text", "output_text")


def read_messages(source: SourceFiles) -> Iterator[Record | Reject]:
    """Yields one conversation per row of a JSONL or JSON file."""
    yield from read_rows(
        iter_items(source.file("path")), lambda row: [message_record(source, row)], source=source, id_column="id"
    )


def message_record(source: SourceFiles, row: Row) -> Record:
    """Returns the conversation of one row."""
    value = as_object(row.value)
    key, turns = taught_turns(source, value, ("messages", "chosen_messages", "conversation"))
    queue = MediaQueue(media_columns(source, value), str(source.columns.get("strip", "")))
    messages = [read_turn(turn, f"/{key}/{at}", queue) for at, turn in enumerate(turns)]
    messages = queue.before_first_question(messages)
    queue.check(messages)
    own = value.get(str(source.columns.get("id", "id")))
    return conversation(
        source,
        row,
        messages,
        pointer=f"/{key}",
        own_id=own if isinstance(own, str | int) else None,
        tools=tools_text(value.get("tools")),
        metadata=row_metadata(value, ("category", "type", "source")),
    )


class MediaQueue:
    """The media listed beside the turns, taken one by one by parts that name no file."""

    def __init__(self, media: Mapping[Modality, list[Medium]], strip: str) -> None:
        self._media = media
        self._used: dict[Modality, int] = dict.fromkeys(MODALITIES, 0)
        self.strip = strip

    def next(self, modality: Modality, pointer: str) -> Medium:
        """Returns the next medium of a modality."""
        at = self._used[modality]
        self._used[modality] += 1
        if at >= len(self._media[modality]):
            raise Refused(
                "media_mismatch",
                f"{pointer}: part {at + 1} of type {modality} but {len(self._media[modality])} {modality} file(s)",
            )
        return self._media[modality][at]

    def before_first_question(self, messages: Sequence[Message]) -> list[Message]:
        """Returns the messages, the row's images before the user's first words where no turn marks a place for any.

        So TRL shows them (``trl.data_utils.prepare_multimodal_messages``). Media of other kinds, and images
        beside a turn that shows or names one, keep the row as it is.
        """
        first = next((at for at, message in enumerate(messages) if message.role == "user"), None)
        marked = any(message.media or PLACEHOLDER.search(message.text) for message in messages)
        if first is None or marked or not self._media["image"]:
            return list(messages)
        self._used["image"] = len(self._media["image"])
        asked = messages[first]
        shown = replace(asked, parts=(*self._media["image"], *asked.parts))
        return [*messages[:first], shown, *messages[first + 1 :]]

    def check(self, messages: Sequence[Message]) -> None:
        """Raises Refused when some media were never shown."""
        for modality in MODALITIES:
            used, have = self._used[modality], len(self._media[modality])
            if used != have:
                marked = any(f"<{modality}>" in message.text for message in messages)
                hint = f"; <{modality}> in a text is words here, and stands for a file with reader: sharegpt"
                detail = f"{used} {modality} part(s) but {have} {modality} file(s){hint if marked else ''}"
                raise Refused("media_mismatch", detail)


def read_turn(turn: Any, pointer: str, queue: MediaQueue) -> Message:
    """Returns one message of a row."""
    value = as_object(turn, pointer)
    role = role_of(value.get("role"), f"{pointer}/role")
    content = value.get("content")
    parts: list[Part] = []
    reasoning = value.get("reasoning_content") or value.get("reasoning") or ""
    calls: list[ToolCall] = list(
        tool_calls_of(value["tool_calls"], f"{pointer}/tool_calls") if value.get("tool_calls") else ()
    )
    if isinstance(content, str):
        parts = [TextPart(content)] if content else []
    elif isinstance(content, list):
        for at, raw in enumerate(content):
            part = as_object(raw, f"{pointer}/content/{at}")
            kind_ = part.get("type")
            if kind_ == "reasoning":
                reasoning += as_text(_payload(part, "reasoning", "text"), f"{pointer}/content/{at}")
            elif kind_ == "tool_call":
                calls += tool_calls_of(_payload(part, "tool_call"), f"{pointer}/content/{at}")
            else:
                parts.append(_part(part, f"{pointer}/content/{at}", queue))
    elif not (content is None and (calls or role == "assistant")):
        raise wrong(f"{pointer}/content", "a string or a list", content)
    name = value.get("name") or ""
    return Message(
        role=role,
        parts=tuple(part for part in parts if not (isinstance(part, TextPart) and not part.text)),
        reasoning=as_text(reasoning, f"{pointer}/reasoning"),
        tool_calls=tuple(calls),
        name=as_text(name, f"{pointer}/name"),
        train=is_taught(value, role, pointer),
    )


def _payload(part: Mapping[str, Any], *keys: str) -> Any:
    for key in (*keys, "value"):
        if part.get(key) is not None:
            return part[key]
    return None


def _part(part: Mapping[str, Any], pointer: str, queue: MediaQueue) -> Part:
    name = part.get("type")
    if name in _TEXT_TYPES:
        return TextPart(as_text(_payload(part, "text"), f"{pointer}/text"))
    if not isinstance(name, str) or name not in _PART_MODALITY:
        said = repr(name) if isinstance(name, str) else kind(name)
        raise Refused("bad_field", f"{pointer}/type: unknown part {said}")
    modality = _PART_MODALITY[name]
    if modality == "behaviour":
        items = _payload(part, "behaviour", "items")
        return queue.next(modality, pointer) if items is None else history(history_items(items, f"{pointer}/{name}"))
    payload = _payload(part, name, modality, f"{modality}_url", "path", "url", "bytes")
    if isinstance(payload, Mapping):
        if "data" in payload:
            return _inline(modality, payload["data"], f"{pointer}/{name}/data")
        payload = payload.get("url", payload.get("path", payload))
    if payload is None:
        return queue.next(modality, pointer)
    if isinstance(payload, str) and payload.startswith("data:"):
        _, _, encoded = payload.partition(",")
        return _inline(modality, encoded, pointer)
    found = media_of(payload, modality, f"{pointer}/{name}", queue.strip)
    if len(found) != 1:
        raise Refused("bad_field", f"{pointer}: one medium per part is expected, found {len(found)}")
    return found[0]


def _inline(modality: Modality, encoded: Any, pointer: str) -> Medium:
    try:
        return Medium(modality, "", data=base64.b64decode(as_text(encoded, pointer), validate=True))
    except (binascii.Error, ValueError) as error:
        raise Refused("bad_field", f"{pointer}: not valid base64") from error
