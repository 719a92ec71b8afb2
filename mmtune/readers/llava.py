"""LLaVA conversations.

A JSON array (or JSONL)::

    [{"system_prompt": "Answer the following questions by considering all images.",
      "image": ["soccer1.jpg", "soccer2.jpg"],
      "conversations": [
        {"from": "human", "value": "<image><image>Which image has more people? ..."},
        {"from": "gpt", "value": "There are five people in the first image, ..."}]},
     {"conversations": [{"from": "human", "value": "What is the capital of France?"},
                        {"from": "gpt", "value": "Paris."}]}]

``image`` and ``video`` are a path or a list of paths. The published files repeat their ``id``
(one per image), so an example's id is its place in the file unless ``columns: {id: id}`` says
otherwise. Rows of the question form ``{"image", "instruction", "output"}`` belong to the
``alpaca`` reader, those of ``{"question_id", "image", "text"}`` to ``table``.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmtune.readers.conversation import conversation, row_metadata
from mmtune.readers.fields import as_list, as_object, missing
from mmtune.readers.sharegpt import turns_of
from mmtune.readers.source import Row, SourceFiles, read_rows
from mmtune.readers.strict_json import iter_items
from mmtune.records import Record, Reject


def read_llava(source: SourceFiles) -> Iterator[Record | Reject]:
    """Yields one conversation per row."""
    yield from read_rows(iter_items(source.file("path")), lambda row: [_record(source, row)], source=source)


def _record(source: SourceFiles, row: Row) -> Record:
    value = as_object(row.value)
    key = str(source.columns.get("messages", "conversations"))
    if key not in value:
        raise missing(value, key)
    messages = turns_of(as_list(value[key], f"/{key}"), f"/{key}", value, source)
    named = source.columns.get("id")
    own = value.get(str(named)) if named is not None else None
    metadata = row_metadata(value, ("type", "category", "source"))
    if isinstance(value.get("id"), str | int):
        metadata["row_id"] = str(value["id"])
    return conversation(source, row, messages, pointer=f"/{key}", own_id=own, metadata=metadata)
