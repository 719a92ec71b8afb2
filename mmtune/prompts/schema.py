"""The one Arrow schema of instructions/, and an Example to a row and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmtune.records import (
    MODALITIES,
    Example,
    Medium,
    Message,
    Modality,
    Part,
    SoftPart,
    TextPart,
    ToolCall,
    history,
    items_of,
)

if TYPE_CHECKING:
    import pyarrow as pa

COLUMN: dict[Modality, str] = {"image": "images", "audio": "audios", "video": "videos", "behaviour": "histories"}
"""Modality to the column that holds its media, in reading order; a history is the list of its items."""


def instructions_schema() -> pa.Schema:
    """Returns the schema of ``instructions/<split>``, the same whatever the data are."""
    import pyarrow as pa

    text, texts = pa.string(), pa.list_(pa.string())
    part = pa.struct([("type", text), ("text", text)])
    message = pa.struct(
        [
            ("role", text),
            ("content", pa.list_(part)),
            ("reasoning", text),
            ("tool_calls", text),
            ("name", text),
            ("train", pa.bool_()),
        ]
    )
    medium = pa.struct(
        [
            ("path", text),
            ("bytes", pa.binary()),
            ("size_bytes", pa.int64()),
            ("sha256", text),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("frames", pa.int32()),
            ("fps", pa.float32()),
            ("sample_rate_hz", pa.int32()),
            ("seconds", pa.float32()),
        ]
    )
    names = ("id", "source", "task", "split", "metric", "template_id", "group", "tools", "metadata")
    return pa.schema(
        [
            *((name, text) for name in names),
            ("messages", pa.list_(message)),
            *((COLUMN[modality], pa.list_(texts if modality == "behaviour" else medium)) for modality in MODALITIES),
            ("references", texts),
            ("options", texts),
            ("exemplar_ids", texts),
            ("feature_ids", texts),
        ]
    )


def example_to_row(example: Example) -> dict[str, Any]:
    """Returns the row of an Example; ``fps`` and ``seconds`` keep 32 bits."""
    media: dict[Modality, list[Any]] = {modality: [] for modality in MODALITIES}
    for medium in example.media:
        media[medium.modality].append(_medium_to_row(medium))
    return {
        "id": example.id,
        "source": example.source,
        "task": example.task,
        "split": example.split,
        "metric": example.metric,
        "template_id": example.template_id,
        "group": example.group,
        "tools": example.tools,
        "metadata": json.dumps(dict(example.metadata), ensure_ascii=False),
        "messages": [_message_to_row(message) for message in example.messages],
        **{COLUMN[modality]: media[modality] for modality in MODALITIES},
        "references": list(example.references),
        "options": list(example.options),
        "exemplar_ids": list(example.exemplar_ids),
        "feature_ids": list(example.feature_ids),
    }


def row_to_example(row: Mapping[str, Any]) -> Example:
    """Returns the Example that a row was made from."""
    return Example(
        id=row["id"],
        source=row["source"],
        task=row["task"],
        split=row["split"],
        messages=row_to_messages(row),
        references=tuple(row["references"]),
        metric=row["metric"],
        options=tuple(row["options"]),
        template_id=row["template_id"],
        exemplar_ids=tuple(row["exemplar_ids"]),
        feature_ids=tuple(row.get("feature_ids") or ()),
        group=row["group"],
        tools=row["tools"],
        metadata=json.loads(row["metadata"]),
    )


def row_to_messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """Returns the messages of a row; only its columns ``messages`` and those of media are read."""
    media = {
        modality: iter([_row_to_medium(modality, item) for item in row.get(column) or ()])
        for modality, column in COLUMN.items()
    }
    return tuple([_row_to_message(message, media) for message in row["messages"]])


def _medium_to_row(medium: Medium) -> dict[str, Any] | list[str]:
    if medium.modality == "behaviour":
        return list(items_of(medium))
    return {
        "path": medium.path,
        "bytes": medium.data,
        "size_bytes": medium.size_bytes,
        "sha256": medium.sha256,
        "width": medium.width,
        "height": medium.height,
        "frames": medium.frames,
        "fps": medium.fps,
        "sample_rate_hz": medium.sample_rate_hz,
        "seconds": medium.seconds,
    }


def _row_to_medium(modality: Modality, row: Any) -> Medium:
    if modality == "behaviour":
        return history(row)
    return Medium(
        modality,
        row["path"],
        row["bytes"],
        row["size_bytes"],
        row["sha256"],
        row["width"],
        row["height"],
        row["frames"],
        row["fps"],
        row["sample_rate_hz"],
        row["seconds"],
    )


def _message_to_row(message: Message) -> dict[str, Any]:
    calls = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
    return {
        "role": message.role,
        "content": [_part_to_row(part) for part in message.parts],
        "reasoning": message.reasoning,
        "tool_calls": json.dumps(calls, ensure_ascii=False) if calls else "",
        "name": message.name,
        # Said of the assistant's turns alone: of a user's it would mean to other trainers that its words are taught.
        "train": None if message.role != "assistant" and message.train else message.train,
    }


def _part_to_row(part: Part) -> dict[str, str | None]:
    if isinstance(part, SoftPart):
        return {"type": "soft", "text": str(part.tokens)}
    return {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": part.modality, "text": None}


def _row_to_part(row: Mapping[str, Any], media: Mapping[Modality, Any]) -> Part:
    if row["type"] == "soft":
        return SoftPart(int(row["text"]))
    return TextPart(row["text"]) if row["type"] == "text" else next(media[row["type"]])


def _row_to_message(row: Mapping[str, Any], media: Mapping[Modality, Any]) -> Message:
    parts = [_row_to_part(part, media) for part in row["content"]]
    calls = json.loads(row["tool_calls"]) if row["tool_calls"] else ()
    return Message(
        row["role"],
        tuple(parts),
        row["reasoning"],
        tuple([ToolCall(call["name"], call["arguments"]) for call in calls]),
        row["name"],
        row["train"] is not False,
    )
