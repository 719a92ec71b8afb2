r"""ShareGPT conversations, in the two spellings that LLaMA-Factory reads.

A JSON array (or JSONL)::

    [{"conversations": [
        {"from": "human", "value": "I have chicken, bell peppers, and rice."},
        {"from": "function_call",
         "value": "{\"name\": \"search_recipes\", \"arguments\": {\"ingredients\": [\"chicken\"]}}"},
        {"from": "observation", "value": "{\"recipes\": [...]}"},
        {"from": "gpt", "value": "I found a recipe..."}],
      "tools": "[{\"name\": \"search_recipes\", ...}]"},
     {"messages": [{"content": "<video><audio>What is the video describing?", "role": "user"},
                   {"content": "A girl who is drawing a picture of a guitar ...",
                    "role": "assistant"}],
      "videos": ["mllm_demo_data/4.mp4"], "audios": ["mllm_demo_data/4.mp3"]}]

``<image>``, ``<video>`` and ``<audio>`` in the user's and the tools' turns stand for the files
listed in ``images``, ``videos`` and ``audios``, in order. ms-swift's turns are read, too: ``"loss": false``
at an answer that bears none, and ``{"human": ..., "assistant": ...}`` in ``conversation``. Preference
files are read as what they prefer: ``chosen`` is the last answer (DPO), or the answer to ``prompt`` (TRL,
see ``messages``); a row with ``label: false`` (KTO) is refused as ``not_preferred``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmtune.readers.conversation import (
    Placeholders,
    conversation,
    is_taught,
    media_columns,
    role_of,
    row_metadata,
    taught_turns,
    tool_calls_of,
    tools_text,
    turn_by_turn,
)
from mmtune.readers.fields import as_object, text_field
from mmtune.readers.source import Row, SourceFiles, read_rows
from mmtune.readers.strict_json import iter_items
from mmtune.records import Message, Record, Reject, TextPart


def read_sharegpt(source: SourceFiles) -> Iterator[Record | Reject]:
    """Yields one conversation per row."""
    yield from read_rows(
        iter_items(source.file("path")), lambda row: [sharegpt_record(source, row)], source=source, id_column="id"
    )


def sharegpt_record(source: SourceFiles, row: Row) -> Record:
    """Returns the conversation of one row."""
    value = as_object(row.value)
    key, turns = taught_turns(source, value, ("conversations", "messages", "conversation"))
    own = value.get(str(source.columns.get("id", "id")))
    return conversation(
        source,
        row,
        turns_of(turn_by_turn(turns), f"/{key}", value, source),
        pointer=f"/{key}",
        own_id=own if isinstance(own, str | int) else None,
        tools=tools_text(value.get("tools")),
        metadata=row_metadata(value, ("category", "type", "source")),
    )


def turns_of(turns: list[Any], pointer: str, row: Mapping[str, Any], source: SourceFiles) -> list[Message]:
    """Returns the messages of a row whose media are marked by placeholders."""
    placeholders = Placeholders(media_columns(source, row))
    messages = [_system(row)] if _system_text(row) else []
    for at, turn in enumerate(turns):
        messages.append(_turn(as_object(turn, f"{pointer}/{at}"), f"{pointer}/{at}", placeholders))
    by_role = all("role" in turn for turn in turns)
    placeholders.check("; reader: messages shows them before the first question" if by_role else "")
    return messages


def _system_text(row: Mapping[str, Any]) -> str:
    text = row.get("system") or row.get("system_prompt") or ""
    return text if isinstance(text, str) else ""


def _system(row: Mapping[str, Any]) -> Message:
    return Message("system", (TextPart(_system_text(row)),))


def _turn(turn: Mapping[str, Any], pointer: str, placeholders: Placeholders) -> Message:
    from_key, text_key = ("from", "value") if "from" in turn or "value" in turn else ("role", "content")
    raw_role = turn.get(from_key)
    role = role_of(raw_role, f"{pointer}/{from_key}")
    text = text_field(turn, text_key, pointer)
    taught = is_taught(turn, role, pointer)
    if raw_role == "function_call":
        return Message("assistant", (), tool_calls=tool_calls_of(text, f"{pointer}/{text_key}"), train=taught)
    if role in ("user", "tool"):
        return Message(role, placeholders.parts(text))
    return Message(role, (TextPart(text),) if text else (), train=taught)
