"""Alpaca instructions, with LLaMA-Factory's optional history, system and media.

A JSON array (or JSONL)::

    [{"instruction": "Describe a process of making crepes.", "input": "",
      "output": "Making crepes is an easy and delicious process! Here are step-by-step ..."},
     {"id": "000000525439", "image": "COCO_val2014_000000525439.jpg",
      "instruction": "What is the position of the skateboard in the image?",
      "output": "The skateboard in the image is in an upside-down position, ...", "type": "conv"}]

``history`` is a list of ``[question, answer]`` pairs that came before. Media (``image``,
``images``, ``audios``, ``videos``, ``histories``) stand where ``<image>`` and its like stand, else first.
``columns`` gives other names: ``instruction``, ``input``, ``output``, ``history``, ``system``.
The published files repeat their ``id``, so it is used only with ``columns: {id: id}``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmtune.readers.conversation import PLACEHOLDER, Placeholders, check_turns, media_columns, row_metadata
from mmtune.readers.fields import answer_text, as_list, as_object, as_text, record_id, text_field
from mmtune.readers.source import Refused, Row, SourceFiles, read_rows
from mmtune.readers.strict_json import iter_items
from mmtune.records import MODALITIES, Message, Record, Reject, TextPart


def read_alpaca(source: SourceFiles) -> Iterator[Record | Reject]:
    """Yields one record per row: an instruction, or a conversation where there is a history."""
    yield from read_rows(iter_items(source.file("path")), lambda row: [_record(source, row)], source=source)


def _record(source: SourceFiles, row: Row) -> Record:
    value = as_object(row.value)
    if value.get("label") is False or value.get("kto_tag") is False:
        raise Refused("not_preferred", "/label: false; this answer is not one to learn")
    instruction = text_field(value, _name(source, "instruction"))
    context = _optional(value, _name(source, "input"))
    output_key = _name(source, "output") if _name(source, "output") in value else "chosen"
    answer = answer_text(text_field(value, output_key if output_key in value else "output"), f"/{output_key}")
    system = _optional(value, _name(source, "system"))
    history = value.get(_name(source, "history")) or []
    media = media_columns(source, value)
    listed = [medium for modality in MODALITIES for medium in media[modality]]
    own = value.get(str(source.columns["id"])) if "id" in source.columns else None
    metadata = row_metadata(value, ("type", "category"))
    marked = PLACEHOLDER.search(instruction + context) is not None
    if not (history or system or marked):
        if not instruction.strip() and not context.strip() and not listed:
            raise Refused("empty_question", "/instruction: there is no instruction")
        return Record(
            id=record_id(source, own, row),
            source=source.id,
            task="instruction",
            split=source.split,
            text=instruction,
            context=context,
            media=tuple(listed),
            references=(answer,),
            metadata=metadata,
            where=row.where,
        )
    placeholders = Placeholders(media)
    turns = [Message("system", (TextPart(system),))] if system else []
    for at, pair in enumerate(as_list(history, "/history")):
        said = as_list(pair, f"/history/{at}")
        if len(said) != 2:
            raise Refused("bad_field", f"/history/{at}: expected a question and an answer, found {len(said)} item(s)")
        turns.append(Message("user", placeholders.parts(as_text(said[0], f"/history/{at}/0"))))
        turns.append(Message("assistant", (TextPart(as_text(said[1], f"/history/{at}/1")),)))
    question = f"{instruction}\n\n{context}" if context else instruction
    parts = placeholders.parts(question)
    if marked:
        placeholders.check()
    else:
        parts = (*listed, *parts)
    turns += [Message("user", parts), Message("assistant", (TextPart(answer),))]
    check_turns(turns, "/history")
    return Record(
        id=record_id(source, own, row),
        source=source.id,
        task="conversation",
        split=source.split,
        messages=tuple(turns),
        metadata=metadata,
        where=row.where,
    )


def _name(source: SourceFiles, key: str) -> str:
    return str(source.columns.get(key, key))


def _optional(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return "" if value is None else as_text(value, f"/{key}")
