"""The values that flow through the pipeline: Record, Example, Prediction.

A reader yields Records (what a file said); prompts turn each into an Example (what is
taught); a model answers with Predictions, which metrics judge. All are frozen and do no I/O.
This module imports nothing of mmtune and no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Modality = Literal["image", "audio", "video", "behaviour"]
IN_FILES: tuple[Modality, ...] = ("image", "audio", "video")
MODALITIES: tuple[Modality, ...] = (*IN_FILES, "behaviour")
READ_BY: dict[str, str] = {"image": "image", "video": "image", "audio": "audio", "behaviour": "behaviour"}
"""Modality to that of the encoder that reads it: a video is its frames."""
Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of text inside a message; never read as markup or placeholder."""

    text: str


@dataclass(frozen=True, slots=True)
class Medium:
    """A pointer to one media file, and what its header told; or a user's history, which no file holds.

    Attributes:
        modality: ``image``, ``audio``, ``video`` or ``behaviour``, see ``history``.
        path: Relative to the media root, with ``/`` between its parts; empty for a history.
        data: The file's bytes when media are embedded, else None; of a history its items.
        size_bytes: Size of the file; 0 until probed.
        sha256: Hex digest, when asked for; else empty.
        width: Pixels, after EXIF rotation; 0 for audio.
        height: Pixels, after EXIF rotation; 0 for audio.
        frames: Frames of a video, 1 for an image, sample frames of an audio file, items of a history.
        fps: Frames per second of a video, else 0.
        sample_rate_hz: Of an audio file, else 0.
        seconds: Duration of audio and video, else 0.
    """

    modality: Modality
    path: str
    data: bytes | None = None
    size_bytes: int = 0
    sha256: str = ""
    width: int = 0
    height: int = 0
    frames: int = 0
    fps: float = 0.0
    sample_rate_hz: int = 0
    seconds: float = 0.0

    @property
    def named(self) -> str:
        """What a message calls it: its path in quotes, or what it is where its bytes stand in the row."""
        return repr(self.path) if self.path or self.data is None else f"the embedded {self.modality}"


def history(items: Sequence[str]) -> Medium:
    """Returns a user's history as a medium: its items are its bytes, so that equal histories are one medium.

    Args:
        items: Ids of what the user chose, oldest first; none of them is empty or holds a line break.
    """
    return Medium("behaviour", "", data="\n".join(items).encode("utf-8", "surrogatepass"), frames=len(items))


def items_of(medium: Medium) -> tuple[str, ...]:
    """Returns the items of a ``history``, oldest first."""
    data = medium.data or b""
    return tuple(data.decode("utf-8", "surrogatepass").split("\n")) if data else ()


@dataclass(frozen=True, slots=True)
class SoftPart:
    """Places of a message that a soft prompt fills: learned vectors in the middle of its text.

    Attributes:
        tokens: How many.
    """

    tokens: int


SOFT_ID = 1 << 24
"""Id of the first soft token in an encoded row, above every vocabulary; those of a message count up from it."""

Part = TextPart | SoftPart | Medium
_SOFT = re.compile("\0soft:([0-9]+)\0")


def marked(parts: Iterable[Part]) -> str:
    """Returns a prompt as one string, soft tokens as marks that no text can hold; media leave no trace."""
    return "".join(
        f"\0soft:{part.tokens}\0" if isinstance(part, SoftPart) else part.text if isinstance(part, TextPart) else ""
        for part in parts
    )


def parts_of(prompt: str) -> tuple[TextPart | SoftPart, ...]:
    """Returns the texts and the soft tokens of a ``marked`` prompt."""
    pieces = enumerate(_SOFT.split(prompt))
    return tuple(SoftPart(int(piece)) if at % 2 else TextPart(piece) for at, piece in pieces if piece)


def merged(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Returns parts with neighbouring texts joined and empty ones left out."""
    out: list[Part] = []
    for part in parts:
        if isinstance(part, TextPart) and out and isinstance(out[-1], TextPart):
            out[-1] = TextPart(out[-1].text + part.text)
        elif not isinstance(part, TextPart) or part.text:
            out.append(part)
    return tuple(out)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool by the assistant; ``arguments`` is a JSON object as text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: a role and its parts in order.

    Attributes:
        role: ``system``, ``user``, ``assistant`` or ``tool``.
        parts: Text, soft tokens and media in reading order.
        reasoning: The assistant's thinking text, kept apart from its answer.
        tool_calls: Calls that an assistant turn makes.
        name: The tool's name in a ``tool`` turn.
        train: Whether an assistant turn bears loss; ignored for other roles.
    """

    role: Role
    parts: tuple[Part, ...]
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    train: bool = True

    @property
    def text(self) -> str:
        """The text parts joined; media leave no trace."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def media(self) -> tuple[Medium, ...]:
        """The media of this turn in reading order."""
        return tuple(part for part in self.parts if isinstance(part, Medium))


@dataclass(frozen=True, slots=True)
class Record:
    """One annotated item as the reader found it, before any prompt.

    A reader fills either ``text`` with ``references`` (question and human answers, or
    captions) or ``messages`` (a ready conversation); never both.

    Attributes:
        id: Unique over the whole build, such as ``vqa/262148000``.
        source: The source's id in the recipe.
        task: ``vqa``, ``caption``, ``count``, ``presence``, ``chart``, ``label``,
            ``instruction``, ``conversation`` or another name that ``prompts`` has wordings for.
        split: ``train``, ``val`` or ``test``.
        text: The question or instruction; empty for captions.
        context: Further input text of an instruction, else empty.
        media: In the order they are shown.
        references: Every human answer or caption; the first is taught unless ``target``.
        target: The answer to teach when it is not the first reference.
        options: Closed answer set, if the data has one.
        messages: The conversation, for conversation readers.
        tools: JSON list of tool schemas as text, or empty.
        metadata: Facts for grouping scores (``answer_type``, ``question_type``, ...).
        rationale: How the answer is reached, where the data say so (chain of thought).
        fields: The raw row's columns, for templates from files that name them; else empty.
        history: Ids of the items that a user chose before, oldest first; None where the data are of no user.
        where: ``file:line`` or ``file#id`` for rejects and lineage.
    """

    id: str
    source: str
    task: str
    split: str
    text: str = ""
    context: str = ""
    media: tuple[Medium, ...] = ()
    references: tuple[str, ...] = ()
    target: str = ""
    options: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()
    tools: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    rationale: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[str, ...] | None = None
    where: str = ""


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that was refused: where it stood and why.

    Attributes:
        where: ``file:line`` or ``file#id``.
        id: The row's own id when it has one.
        reason: A short reason code, such as ``media_missing`` or ``bad_json``.
        detail: One sentence for a person.
    """

    where: str
    id: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """One instruction example: the messages to teach, and what counts as right.

    Attributes:
        exemplar_ids: Solved rows before the question, in the order they stand.
        feature_ids: ``kind/id`` of what its text and history are in features/.
        group: Equal for examples that show the same media in the same order; they can
            share one prefix. Equals the example's own id when it has no media.
    """

    id: str
    source: str
    task: str
    split: str
    messages: tuple[Message, ...]
    references: tuple[str, ...]
    metric: str
    options: tuple[str, ...] = ()
    template_id: str = ""
    exemplar_ids: tuple[str, ...] = ()
    group: str = ""
    tools: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    feature_ids: tuple[str, ...] = ()

    @property
    def media(self) -> tuple[Medium, ...]:
        """Every medium of the conversation in reading order."""
        return tuple(medium for message in self.messages for medium in message.media)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one model said to one example.

    Attributes:
        model: ``base``, ``tuned`` or another name of the comparison.
    """

    id: str
    model: str
    task: str
    metric: str
    prompt: str
    prediction: str
    references: tuple[str, ...]
    options: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
