"""A conversation to ids, labels and media spans: equal to the family's own rendering, and safe."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmtune.encoding.control import Block, ControlTokens, TextEncoder
from mmtune.encoding.leaves import escaped
from mmtune.encoding.media_tokens import MediaCounter
from mmtune.encoding.processor import chat_template_of, tokenizer_of
from mmtune.encoding.refused import Refused
from mmtune.encoding.skeleton import Shape, SkeletonMaker, media_of, shape_of
from mmtune.records import SOFT_ID, Medium, Message, Part, SoftPart

IGNORED = -100


@dataclass(frozen=True, slots=True)
class MediaSpan:
    """Where a medium's tokens stand in a row.

    Attributes:
        medium: The pointer; a video counts as one image per sampled frame.
        start: First position of its tokens, structure around it included.
        length: Number of its tokens.
        frame: Index of the sampled frame of a video, else 0.
        frames: Number of sampled frames of a video, else 0.
    """

    medium: Medium
    start: int
    length: int
    frame: int = 0
    frames: int = 0


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One conversation as the model sees it.

    Attributes:
        input_ids: ``(T,)`` int32.
        labels: ``(T,)`` int32, -100 where there is no loss.
        media: Spans in order.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    media: tuple[MediaSpan, ...]


# A compiled piece: ("text", str, loss) | ("slot", index, loss, form) | ("media", index)
# | ("ids", ids, flags before, flags after, bears)
_Op = tuple[Any, ...]
# How a control token treats the spaces beside it; None where there is none.
_Flags = tuple[bool, bool] | None
# Which ids bear loss; None for none of them.
_Bears = np.ndarray | None
# Control ids that bear no loss, and their flags.
_Silent = tuple[np.ndarray, tuple[bool, bool]]
_NONE = np.empty(0, dtype=np.int32)
_BARE = (False, False)


@dataclass(frozen=True, slots=True)
class _Program:
    """A compiled skeleton, and the ids that the tokenizer puts around any text."""

    ops: list[_Op]
    before: np.ndarray
    after: np.ndarray


class Renderer:
    """Encodes conversations for one processor.

    Args:
        processor: A transformers processor, or a tokenizer of a text model.
        video_frames: Images that stand for one video.
    """

    def __init__(self, processor: Any, *, video_frames: int = 8) -> None:
        tokenizer = tokenizer_of(processor)
        self.control = ControlTokens(processor)
        self._encoder = TextEncoder(processor, self.control)
        multimodal = tokenizer is not processor
        self.counter = MediaCounter(processor)
        self._video_frames = video_frames
        self._expansions: dict[str, list[str | _Silent]] = {}
        # Text models' templates want strings; a multimodal template wants parts.
        self._maker = SkeletonMaker(
            chat_template_of(processor),
            tokenizer.special_tokens_map,
            flat_content=None if multimodal else True,
            control_end=self.control.ends,
        )
        self._bos = tokenizer.bos_token or ""
        self._soft = True
        self._around = _added_around(tokenizer) if multimodal else (_NONE, _NONE)
        self._programs: OrderedDict[Any, _Program] = OrderedDict()

    def encode(self, messages: Sequence[Message], tools: str = "", add_generation_prompt: bool = False) -> EncodedRow:
        """Returns the encoded conversation.

        Args:
            messages: The conversation; leave the last answer out and ask for the generation
                prompt to encode a prompt.
            tools: JSON list of tool schemas, or empty.
            add_generation_prompt: End where the model must go on.

        Raises:
            Refused: The template, a medium or the text makes an exact encoding impossible.
        """
        media = media_of(messages)
        if any(medium.modality == "video" for medium in media):
            messages = self._with_frames(messages)
            media = media_of(messages)
        shape = shape_of(messages, tools)
        for text in shape.texts:
            if isinstance(text, str) and not self._encoder.clean(text):
                raise Refused("control_token_in_text", "the text holds a private-use character in use as a marker")
        key = (shape.key, add_generation_prompt)
        program = self._programs.get(key)
        if program is None:
            program = self._compile(messages, tools, add_generation_prompt)
            self._programs[key] = program
            if len(self._programs) > 512:
                self._programs.popitem(last=False)
        return self._run(program, shape, media)

    def without_soft_tokens(self) -> Renderer:
        """Returns a renderer that leaves soft tokens out, for a model that has none."""
        other = copy(self)
        other._soft = False
        return other

    def _with_frames(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Shows each video as sampled frames."""
        shown = []
        for message in messages:
            parts: list[Part] = []
            for part in message.parts:
                if isinstance(part, Medium) and part.modality == "video":
                    # `fps` of -1-i marks frame i of the video until its span is made.
                    frames = range(self._frames(part))
                    parts += [replace(part, modality="image", fps=-1.0 - index) for index in frames]
                else:
                    parts.append(part)
            shown.append(replace(message, parts=tuple(parts)))
        return shown

    def _frames(self, video: Medium) -> int:
        return max(1, min(self._video_frames, video.frames or self._video_frames))

    def _expand(self, medium: Medium, images: int) -> list[str | _Silent]:
        """Returns the text and control ids that stand for one medium."""
        text = self.counter.expansion(medium, images)
        found = self._expansions.get(text)
        if found is None:
            if len(self._expansions) >= 4096:
                self._expansions.clear()
            pieces = self.control.parse(text, placeholders=False)
            found = [piece if isinstance(piece, str) else _silent(piece) for piece in pieces]
            self._expansions[text] = found
        return found

    def _compile(self, messages: Sequence[Message], tools: str, generation_prompt: bool) -> _Program:
        media = media_of(messages)
        for medium in media:
            self.counter.placeholder(medium.modality)
        pieces = self._maker.pieces(messages, tools, generation_prompt)
        starts_with_bos = bool(self._bos) and "".join(piece.text for piece in pieces[:1]).startswith(self._bos)
        # The tokenizer adds these ids after encoding, so they are no part of the string.
        around = (_NONE, _NONE) if starts_with_bos else self._around
        ops: list[_Op] = []
        shown = 0
        for piece in pieces:
            if piece.slot >= 0:
                ops.append(("slot", piece.slot, piece.loss, piece.form))
                continue
            for part in self.control.parse(piece.text, placeholders=bool(media)):
                if isinstance(part, str):
                    ops.append(("text", part, piece.loss))
                elif part.placeholder:
                    ops.append(("media", shown))
                    shown += 1
                else:
                    bears = np.ones(len(part.ids), dtype=bool) if piece.loss else None
                    ops.append(("ids", _array(part.ids), part.flags, part.flags, bears))
        if shown != len(media):
            raise Refused("template_refused", f"the chat template shows {shown} of {len(media)} media")
        return _Program(self._fold(ops), *around)

    def _fold(self, ops: list[_Op]) -> list[_Op]:
        """Encodes what no text or medium of a row can touch: text with control tokens on both sides."""
        folded: list[_Op] = []
        at = 0
        while at < len(ops):
            end = at
            while end < len(ops) and ops[end][0] == "text":
                end += 1
            left = folded[-1] if folded else None
            right = ops[end] if end < len(ops) else None
            fixed = all(side is None or side[0] == "ids" for side in (left, right))
            if end > at and fixed:
                row = _Writer(self._encoder, _NONE, left[3] if left else None)
                for _, text, loss in ops[at:end]:
                    row.text(text, loss)
                ids, labels = row.close(_NONE, right[2] if right else None)
                bears = labels != IGNORED
                _join(folded, ("ids", ids, None, right[2] if right else None, bears if bears.any() else None))
            else:
                folded += ops[at:end]
            if right is not None:
                _join(folded, right)
            at = end + 1
        return folded

    def _run(self, program: _Program, shape: Shape, media: Sequence[Medium]) -> EncodedRow:
        row = _Writer(self._encoder, program.before)
        softs = _soft_starts(shape)
        images = sum(medium.modality == "image" for medium in media)
        spans: list[MediaSpan] = []
        for op in program.ops:
            kind = op[0]
            if kind == "ids":
                row.block(op[1], op[2], op[3], op[4])
            elif kind == "slot":
                text = shape.texts[op[1]]
                if isinstance(text, str):
                    row.text(escaped(text, op[3]), op[2])
                elif self._soft:
                    start = softs[op[1]]
                    row.block(np.arange(start, start + text.tokens, dtype=np.int32), _BARE, _BARE, None)
            elif kind == "text":
                row.text(op[1], op[2])
            else:
                medium = media[op[1]]
                first = -1
                for part in self._expand(medium, images):
                    if isinstance(part, str):
                        row.text(part, False)
                    else:
                        row.block(part[0], part[1], part[1], None)
                        first = row.length - part[0].size if first < 0 else first
                spans.append(self._span(medium, max(first, 0), row.length))
        ids, labels = row.close(program.after)
        return EncodedRow(ids, labels, tuple(spans))

    def _span(self, medium: Medium, start: int, end: int) -> MediaSpan:
        if medium.fps >= 0:
            return MediaSpan(medium, start, end - start)
        video = replace(medium, modality="video", fps=0.0)
        return MediaSpan(video, start, end - start, int(-1 - medium.fps), self._frames(video))


class _Writer:
    """Collects the ids of a row, encoding each run of text when the control token after it is known."""

    def __init__(self, encoder: TextEncoder, before: np.ndarray, left: _Flags = None) -> None:
        self._encoder = encoder
        self._ids = [before]
        # Where loss is borne: first place, and which ids from there.
        self._bears: list[tuple[int, np.ndarray]] = []
        self._run: list[tuple[str, bool]] = []
        self._left = left
        self.length = before.size

    def text(self, text: str, loss: bool) -> None:
        """Adds text."""
        self._run.append((text, loss))

    def block(self, ids: np.ndarray, first: _Flags, last: _Flags, bears: _Bears) -> None:
        """Adds control ids that begin and end with tokens of these flags."""
        if self._run:
            self._flush(first)
        self._left = last
        self._add(ids, bears)

    def close(self, after: np.ndarray, right: _Flags = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of the row, and its labels."""
        if self._run:
            self._flush(right)
        self._add(after, None)
        ids = np.concatenate(self._ids)
        labels = np.full(ids.size, IGNORED, dtype=np.int32)
        for start, bears in self._bears:
            end = start + bears.size
            np.copyto(labels[start:end], ids[start:end], where=bears)
        return ids, labels

    def _add(self, ids: np.ndarray, bears: _Bears) -> None:
        if bears is not None:
            self._bears.append((self.length, bears))
        self._ids.append(ids)
        self.length += ids.size

    def _flush(self, right: _Flags) -> None:
        run, self._run = self._run, []
        text = run[0][0] if len(run) == 1 else "".join([piece for piece, _ in run])
        if not any(loss for _, loss in run):
            self._add(self._encoder.encode(text, self._left, right), None)
            return
        ids, ends = self._encoder.encode_with_ends(text, self._left, right)
        bears = np.zeros(ids.size, dtype=bool)
        at = 0
        for piece, loss in run:
            if loss:
                # A token belongs to where its last character stands.
                bears |= (ends > at) & (ends <= at + len(piece))
            at += len(piece)
        self._add(ids, bears)


def _join(ops: list[_Op], op: _Op) -> None:
    """Appends an op; ids that follow ids become one op with them."""
    if ops and ops[-1][0] == op[0] == "ids":
        last = ops.pop()
        ids = np.concatenate([last[1], op[1]])
        bears = np.concatenate([_all_bears(last), _all_bears(op)])
        op = ("ids", ids, last[2], op[3], bears if bears.any() else None)
    ops.append(op)


def _soft_starts(shape: Shape) -> dict[int, int]:
    """Returns the first id of each run of soft tokens by its text's number; a message's runs follow one another."""
    starts: dict[int, int] = {}
    ends: dict[int, int] = {}
    for number, (text, owner) in enumerate(zip(shape.texts, shape.owners, strict=True)):
        if isinstance(text, SoftPart):
            starts[number] = ends.get(owner, SOFT_ID)
            ends[owner] = starts[number] + text.tokens
    return starts


def _all_bears(op: _Op) -> np.ndarray:
    return np.zeros(op[1].size, dtype=bool) if op[4] is None else op[4]


def _silent(block: Block) -> _Silent:
    return _array(block.ids), block.flags


def _array(ids: Sequence[int]) -> np.ndarray:
    return np.asarray(ids, dtype=np.int32)


def _added_around(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids that the tokenizer's post-processor puts before and after any text."""
    with_added = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(with_added) - len(bare) + 1):
        if with_added[start : start + len(bare)] == bare:
            return _array(with_added[:start]), _array(with_added[start + len(bare) :])
    return _NONE, _NONE
