"""Exemplars as text of one turn: what stands between them, and between a question and its answer.

The Flan collection (arXiv:2301.13688) varies both, so that a model does not learn one layout. A row keeps its exemplars
as turns of a conversation, and the name of its delimiters beside them; where it is encoded it is ``joined``. So
whatever drops, counts or compares exemplars sees turns, whichever way they are shown.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mmtune.records import Example, Message, Part, SoftPart, TextPart, merged

DELIMITERS = "delimiters"
"""Metadata key with the name of a row's delimiters; a row without it shows its exemplars as turns."""
TURNS = "turns"
"""What rows without delimiters are counted as."""


@dataclass(frozen=True, slots=True)
class Delimiters:
    """What parts solved rows from each other.

    Attributes:
        question: Before a question.
        answer: Between a question and its answer; the last one, without the blanks at its end, closes the turn.
        between: Behind an answer.
    """

    question: str
    answer: str
    between: str


FORMS: Mapping[str, Delimiters] = {
    "one_line": Delimiters("", " ", "\n"),
    "arrow": Delimiters("", " -> ", "\n"),
    "blank_line": Delimiters("", "\n", "\n\n"),
    "blank_lines": Delimiters("", "\n\n", "\n\n\n\n"),
    "rule": Delimiters("", "\n", "\n---\n"),
    "letters": Delimiters("Q: ", "\nA: ", "\n\n"),
    "words": Delimiters("Question: ", "\nAnswer: ", "\n\n\n"),
    "input_output": Delimiters("Input: ", "\nOutput: ", "\n###\n"),
}
"""Name to the delimiters that a row may draw."""


def delimited(example: Example, share: float, seed: int) -> Example:
    """Returns a row with the delimiters that it draws by seed and id, or as it is.

    A row without exemplars has none to part. One with soft tokens stays turns: each of its questions shows the same
    tokens, and within one turn they would be others. So does a conversation, whose own turns are what it teaches.

    Args:
        example: A training row.
        share: Of the rows with exemplars that show them as text.
        seed: Of the draw.
    """
    soft = any(isinstance(part, SoftPart) for message in example.messages for part in message.parts)
    dice = random.Random(f"{DELIMITERS}\0{seed}\0{example.id}")
    stays = not example.exemplar_ids or not example.template_id or soft
    if stays or dice.random() >= share:
        return example
    return replace(example, metadata={**example.metadata, DELIMITERS: dice.choice(sorted(FORMS))})


def joined(messages: Sequence[Message], name: str | None) -> Sequence[Message]:
    """Returns a conversation whose exemplars stand in its last question, between delimiters.

    Args:
        messages: An exemplar is what stands up to an answer that bears no loss.
        name: One of ``FORMS``; None leaves the turns.
    """
    ends = [at + 1 for at, message in enumerate(messages) if message.role == "assistant" and not message.train]
    if name is None or not ends:
        return messages
    form = FORMS[name]
    head = [message for message in messages if message.role == "system"]
    parts: list[Part] = []
    for start, end in zip([0, *ends], ends, strict=False):
        solved = messages[end - 1]
        parts += [TextPart(form.question), *_asked(messages[start:end])]
        parts += [TextPart(form.answer), *solved.parts, TextPart(form.between)]
    rest = messages[ends[-1] :]
    parts += [TextPart(form.question), *_asked(rest), TextPart(form.answer.rstrip())]
    answers = [message for message in rest if message.role != "user"]
    return (*head, Message("user", merged(parts)), *answers)


def _asked(messages: Sequence[Message]) -> list[Part]:
    return [part for message in messages if message.role == "user" for part in message.parts]
