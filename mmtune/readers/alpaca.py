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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmtune.readers.conversation import PLACEHOLDER, Placeholders, check_turns, media_columns, row_metadata
from mmtune.readers.fields import answer_text, as_list, as_object, as_text, record_id, text_field
from mmtune.readers.source import Refused, Row, SourceFiles, read_rows
from mmtune.readers.strict_json import iter_items
from mmtune.records import MODALITIES, Medium, Message, Modality, Record, Reject, TextPart


def read_alpaca(source: SourceFiles) -> Iterator[Record | Reject]:
    """Yields one record per row: an instruction, or a conversation where there is a history."""
    yield from read_rows(iter_items(source.file("path")), lambda row: [_record(source, row)], source=source)


@dataclass(frozen=True, slots=True)
class _Task:
    """What is asked and answered.

    Attributes:
        instruction: What to do.
        context: What to do it with, or empty.
        answer: The answer to learn.
        system: System turn, or empty.
        history: What was said before, as it stands in the file.
        media: By modality.
    """

    instruction: str
    context: str
    answer: str
    system: str
    history: Any
    media: Mapping[Modality, Sequence[Medium]]

    @property
    def listed(self) -> tuple[Medium, ...]:
        """All media, in the order of modalities."""
        return tuple(medium for modality in MODALITIES for medium in self.media[modality])

    @property
    def marked(self) -> bool:
        """Whether the text says where media stand."""
        return PLACEHOLDER.search(self.instruction + self.context) is not None


def _record(source: SourceFiles, row: Row) -> Record:
    value = as_object(row.value)
    if value.get("label") is False or value.get("kto_tag") is False:
        raise Refused("not_preferred", "/label: false; this answer is not one to learn")
    task = _task(source, value)
    own = value.get(str(source.columns["id"])) if "id" in source.columns else None
    told: dict[str, Any] = {
        "id": record_id(source, own, row),
        "source": source.id,
        "split": source.split,
        "metadata": row_metadata(value, ("type", "category")),
        "where": row.where,
    }
    if task.history or task.system or task.marked:
        return Record(task="conversation", messages=_turns(task), **told)
    if not task.instruction.strip() and not task.context.strip() and not task.listed:
        raise Refused("empty_question", "/instruction: there is no instruction")
    shown: dict[str, Any] = {"text": task.instruction, "context": task.context, "media": task.listed}
    return Record(task="instruction", references=(task.answer,), **shown, **told)


def _task(source: SourceFiles, value: Mapping[str, Any]) -> _Task:
    output_key = _name(source, "output") if _name(source, "output") in value else "chosen"
    return _Task(
        instruction=text_field(value, _name(source, "instruction")),
        context=_optional(value, _name(source, "input")),
        answer=answer_text(text_field(value, output_key if output_key in value else "output"), f"/{output_key}"),
        system=_optional(value, _name(source, "system")),
        history=value.get(_name(source, "history")) or [],
        media=media_columns(source, value),
    )


def _turns(task: _Task) -> tuple[Message, ...]:
    """Returns a conversation: the system turn, what was said before, and the task."""
    placeholders = Placeholders(task.media)
    turns = [Message("system", (TextPart(task.system),))] if task.system else []
    for at, pair in enumerate(as_list(task.history, "/history")):
        said = as_list(pair, f"/history/{at}")
        if len(said) != 2:
            raise Refused("bad_field", f"/history/{at}: expected a question and an answer, found {len(said)} item(s)")
        turns.append(Message("user", placeholders.parts(as_text(said[0], f"/history/{at}/0"))))
        turns.append(Message("assistant", (TextPart(as_text(said[1], f"/history/{at}/1")),)))
    question = f"{task.instruction}\n\n{task.context}" if task.context else task.instruction
    parts = placeholders.parts(question)
    if task.marked:
        placeholders.check()
    else:
        parts = (*task.listed, *parts)
    turns += [Message("user", parts), Message("assistant", (TextPart(task.answer),))]
    check_turns(turns, "/history")
    return tuple(turns)


def _name(source: SourceFiles, key: str) -> str:
    return str(source.columns.get(key, key))


def _optional(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return "" if value is None else as_text(value, f"/{key}")
