"""A Record becomes an Example: a small pool of prompts per task, drawn per row by its id.

The draw depends on the seed and the row's own id (for captions on the image), never on the
order of rows or the number of processes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmtune.records import Example, Medium, Message, Part, Record, Reject, TextPart


@dataclass(frozen=True, slots=True)
class Template:
    """One wording of a task.

    Attributes:
        id: Short name, unique over all tasks.
        prompt: The user's turn; ``{question}``, ``{context}`` and ``{options}`` are filled in.
    """

    id: str
    prompt: str


POOLS: dict[str, tuple[Template, ...]] = {
    "vqa": (
        Template("vqa_short", "{question}\nAnswer the question using a single word or phrase."),
        Template("vqa_plain", "{question}"),
        Template("vqa_question", "Question: {question}\nShort answer:"),
        Template("vqa_look", "Look at the picture and answer briefly: {question}"),
    ),
    "caption": (
        Template("caption_sentence", "Describe the image in one sentence."),
        Template("caption_short", "Write a short caption for this image."),
        Template("caption_what", "What does this picture show?"),
        Template("caption_provide", "Provide a one-sentence caption for the image."),
    ),
    "count": (
        Template("count_number", "{question}\nAnswer with a number."),
        Template("count_plain", "{question}"),
        Template("count_digits", "Count carefully: {question} Reply with digits only."),
    ),
    "presence": (
        Template("presence_yes_no", "{question}\nAnswer yes or no."),
        Template("presence_plain", "{question}"),
        Template("presence_look", "Look at the image. {question} Reply with yes or no."),
    ),
    "chart": (
        Template("chart_short", "{question}\nAnswer the question using a single word, number or phrase."),
        Template("chart_plain", "{question}"),
        Template("chart_read", "Read the chart and answer: {question}"),
    ),
    "label": (
        Template("label_category", "Which category does this belong to? Answer with its name only."),
        Template("label_what", "What is this? Answer with one label."),
        Template("label_classify", "Classify this input. Reply with the label."),
    ),
    "label_options": (
        Template("label_choose", "Choose the label that fits: {options}."),
        Template("label_which", "Which of these is it: {options}? Answer with its name only."),
        Template("label_options_classify", "Classify this input as one of: {options}."),
    ),
    "choice": (
        Template("choice_list", "{question}\nOptions: {options}\nAnswer with one of the options."),
        Template("choice_among", "{question} Choose among: {options}."),
    ),
    "instruction": (Template("instruction_plain", "{question}"),),
}
"""Task to its wordings; the first is the one of ``templates: first``."""

METRICS = {
    "vqa": "vqa_accuracy",
    "chart": "relaxed_accuracy",
    "count": "accuracy",
    "presence": "accuracy",
    "label": "accuracy",
}
"""Task to the metric its examples are scored with; other tasks have ``none``."""

_MANY_OPTIONS = 20
_SLOT = re.compile(r"\{(question|context|options)\}")


def make_example(
    record: Record,
    *,
    seed: int = 0,
    templates: Literal["pool", "first"] = "pool",
    template: str | None = None,
    system: str = "",
) -> Example | Reject:
    """Returns the Example of a Record, or why there is nothing to teach.

    Args:
        record: What the reader found.
        seed: Of the template draw.
        templates: ``pool`` draws, ``first`` always takes the task's first wording.
        template: Name of one template to use for every row.
        system: System turn put first; a conversation's own system turn wins.
    """
    if record.messages:
        messages, template_id = _with_system(record.messages, system), ""
        references: tuple[str, ...] = tuple(text for text in (_last_answer(record.messages),) if text)
    else:
        target = (record.target or next(iter(record.references), "")).strip()
        if not target and record.split == "train":
            return Reject(record.where, record.id, "no_target", "a training row needs an answer")
        chosen = choose_template(record, seed=seed, templates=templates, template=template)
        template_id = chosen.id
        prompt = _fill(chosen.prompt, record)
        if record.context:
            prompt = f"{prompt}\n\n{record.context}"
        user: list[Part] = [*record.media, *([TextPart(prompt)] if prompt else [])]
        turns = [Message("user", tuple(user))] if user else []
        if target:
            turns.append(Message("assistant", (TextPart(target),)))
        messages = _with_system(tuple(turns), system)
        references = record.references or ((target,) if target else ())
    media = tuple(medium for message in messages for medium in message.media)
    opening = messages[0].text if messages and messages[0].role == "system" else ""
    return Example(
        id=record.id,
        source=record.source,
        task=record.task,
        split=record.split,
        messages=messages,
        references=references,
        metric=_metric(record),
        options=record.options,
        template_id=template_id,
        group=group_key(media, opening + record.tools) if media else record.id,
        tools=record.tools,
        metadata=record.metadata,
    )


def choose_template(
    record: Record, *, seed: int, templates: Literal["pool", "first"] = "pool", template: str | None = None
) -> Template:
    """Returns the wording for a record; captions of one image share theirs.

    Raises:
        KeyError: There is no template of that name.
    """
    pool = POOLS[_pool_name(record)]
    if template is not None:
        return template_names()[template]
    if templates == "first" or len(pool) == 1:
        return pool[0]
    basis = record.id
    if record.task == "caption" and all(medium.path for medium in record.media):
        # The bare file names: the draw must not change when the media root does.
        basis = "\0".join((record.source, *(medium.path.rpartition("/")[2] for medium in record.media)))
    digest = hashlib.blake2b(f"{seed}\0{basis}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return pool[int.from_bytes(digest, "big") % len(pool)]


def template_names() -> dict[str, Template]:
    """Returns every template by its id."""
    return {template.id: template for pool in POOLS.values() for template in pool}


def group_key(media: Sequence[Medium], context: str = "") -> str:
    """Returns a short hash that is equal for the same media in the same order (and system text)."""
    digest = hashlib.blake2b(context.encode("utf-8", "surrogatepass"), digest_size=12)
    for medium in media:
        content = (
            hashlib.sha256(medium.data).hexdigest() if medium.data is not None and not medium.path else medium.path
        )
        digest.update(f"\0{medium.modality}:{content}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _pool_name(record: Record) -> str:
    few = 0 < len(record.options) <= _MANY_OPTIONS
    if record.task == "label" and not record.text:
        return "label_options" if few else "label"
    if few and record.text and record.task not in ("count", "presence"):
        return "choice"
    return record.task if record.task in POOLS and record.task != "label" else "instruction"


def _fill(prompt: str, record: Record) -> str:
    # One pass, so that braces inside a question are never filled again.
    values = {"question": record.text, "context": record.context, "options": ", ".join(record.options)}
    return _SLOT.sub(lambda match: values[match.group(1)], prompt)


def _metric(record: Record) -> str:
    if record.task == "vqa" and len(record.references) == 1:
        # The VQA formula counts agreeing people; with one answer it would never reach 100.
        return "exact_match"
    if not record.references and not record.target:
        return "none"
    return METRICS.get(record.task, "none")


def _with_system(messages: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    if not system or (messages and messages[0].role == "system"):
        return messages
    return (Message("system", (TextPart(system),)), *messages)


def _last_answer(messages: tuple[Message, ...]) -> str:
    last = messages[-1]
    return last.text if last.role == "assistant" else ""
