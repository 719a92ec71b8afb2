"""What a template is, and how its slots are filled from a record.

Two forms: ``slots`` has FLAN's braces (``{question}``, ``{options_}``) and ``{soft: 8}``, eight learned vectors
at that place; ``jinja`` is PromptSource's
text with ``|||`` between what is asked and what is answered, and ``{{ soft(8) }}`` for the learned vectors. Only the
first is filled here; the second is rendered in a process of its own (``jinja_process``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from mmtune.records import Modality, Record, Reject, SoftPart, marked

AnswerKind = Literal["text", "label", "number", "yes_no", "entities"]
MEDIA = "\0media\0"
"""Stands where the media of a row go; a template that does not say where has them first."""
_SLOT = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*)\}|\{soft:\s*([1-9][0-9]{0,2})\}")


@lru_cache(maxsize=4096)
def _names(text: str) -> frozenset[str]:
    return frozenset(name for name, _ in _SLOT.findall(text) if name)


@dataclass(frozen=True, slots=True)
class Template:
    """One wording of a task.

    Attributes:
        id: Short name, unique over all tasks of a pool or file.
        prompt: The user's turn; in ``jinja`` form the whole text with ``|||``.
        answer: The assistant's turn in ``slots`` form.
        task: The task that it words; empty for any.
        answer_kind: What an answer is.
        choices: PromptSource's ``answer_choices``: Jinja text, options between ``|||``.
        options_shown: Whether a ``jinja`` prompt lists its choices.
        inverted: Asks for another thing than the task's answer, such as the question to an answer.
        form: How braces are read.
        raw: May name the columns of the raw row, and not only the slots of a record.
        speaks_of: Kinds of media that its words fit; empty for any row, also one without media.
    """

    id: str
    prompt: str
    answer: str = "{answer}"
    task: str = ""
    answer_kind: AnswerKind = "text"
    choices: str = ""
    options_shown: bool = False
    inverted: bool = False
    form: Literal["slots", "jinja"] = "slots"
    raw: bool = False
    speaks_of: frozenset[Modality] = frozenset()

    @property
    def shows_options(self) -> bool:
        """Whether the prompt lists the options."""
        return self.options_shown or bool({"options", "options_"} & self.slots)

    @property
    def slots(self) -> frozenset[str]:
        """Names in single braces of prompt and answer; empty in ``jinja`` form."""
        if self.form == "jinja":
            return frozenset()
        return _names(self.prompt) | _names(self.answer)


@dataclass(frozen=True, slots=True)
class Filled:
    """A template filled with one record.

    Attributes:
        prompt: What the user says; ``MEDIA`` where the media stand, if it says so.
        taught: What the assistant says; empty when nothing is known.
        references: Everything that counts as right.
        options: The closed answer set, in the template's words.
    """

    prompt: str
    taught: str
    references: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


Render = Callable[[Template, Mapping[str, Any], str], Filled | Reject]
"""Template, values and the row's salt to the filled ``jinja`` template, or its refusal."""


def slot_values(record: Record) -> dict[str, Any]:
    """Returns what the slots of a template may name, those that a record has.

    ``question`` (or ``text``, ``instruction``), ``context``, ``dialogue`` (context and text),
    ``options`` (a comma between them), ``options_`` (FLAN's list), ``answer`` (or ``target``),
    ``types`` (of entities).
    """
    answer = record.target or next(iter(record.references), "")
    dialogue = "\n".join(text for text in (record.context, record.text) if text)
    values = {
        **dict.fromkeys(("question", "text", "instruction"), record.text),
        **dict.fromkeys(("answer", "target"), answer),
        "context": record.context,
        "dialogue": dialogue,
        "options": ", ".join(record.options),
        "options_": options_list(record.options),
        "types": str(record.fields.get("types", "")),
    }
    return {name: value for name, value in values.items() if value}


def raw_values(record: Record) -> dict[str, Any]:
    """Returns the slots of a record, its metadata and the columns of its raw row, the last winning.

    ``label`` is the answer's place among the options, ``answer_choices`` is not among them, and
    ``answers`` has SQuAD's form.
    """
    values: dict[str, Any] = {
        **slot_values(record),
        "references": list(record.references),
        "answers": {"text": list(record.references)},
        "media": MEDIA,
    }
    answer = record.target or next(iter(record.references), "")
    if answer in record.options:
        values["label"] = record.options.index(answer)
    return {**values, **record.metadata, **record.fields}


def options_list(options: tuple[str, ...]) -> str:
    """Returns FLAN's list of options, or nothing when there are none."""
    return "\n".join(("OPTIONS:", *(f"- {option}" for option in options))) if options else ""


def missing_slots(template: Template, names: Iterable[str]) -> tuple[str, ...]:
    """Returns the names in braces that there is no value for; an answer may be unknown."""
    return tuple(sorted(template.slots.difference(names, ("media", "answer", "target"))))


def fill_slots(template: Template, record: Record, values: Mapping[str, Any]) -> Filled:
    """Returns a ``slots`` template filled; braces inside a value are never filled again.

    Args:
        template: Of form ``slots``, with no missing slot.
        record: Its references stay what they are where the template answers with ``{answer}`` alone.
        values: Name to value.
    """
    known = {"answer": "", "target": "", **values, "media": MEDIA}
    prompt, taught = _fill(template.prompt, known), _fill(template.answer, known).strip()
    own = template.answer == "{answer}"
    references = record.references if own and record.references else (taught,) if taught else ()
    return Filled(prompt, taught, references, record.options)


def _fill(text: str, values: Mapping[str, Any]) -> str:
    def value(match: re.Match[str]) -> str:
        if match.group(2):
            return marked((SoftPart(int(match.group(2))),))
        return str(values[match.group(1)]) if match.group(1) else match.group(0)[0]

    return _SLOT.sub(value, text)
