"""A conversation to ids, labels and media spans: equal to the family's own rendering, and safe."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmtune.encoding.control import Block, ControlTokens, TextEncoder
from mmtune.encoding.leaves import escaped
from mmtune.encoding.media_tokens import MediaCounter
from mmtune.encoding.processor import chat_template_of, tokenizer_of
from mmtune.encoding.refused import Refused
from mmtune.encoding.skeleton import SkeletonMaker, media_of, shape_of
from mmtune.records import Medium, Message, TextPart

IGNORED = -100
_NOWHERE = (-1, -1)


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


# A compiled piece: ("text", str, loss) | ("slot", index, loss, form) | ("ids", ids, flags, loss) | ("media", index)
_Op = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Program:
    """A compiled skeleton, and the ids that the tokenizer puts around any text."""

    ops: list[_Op]
    before: tuple[int, ...]
    after: tuple[int, ...]


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
        self._expansions: dict[str, list[str | Block]] = {}
        # Text models' templates want strings; a multimodal template wants parts.
        self._maker = SkeletonMaker(
            chat_template_of(processor),
            tokenizer.special_tokens_map,
            flat_content=None if multimodal else True,
            control_end=self.control.ends,
        )
        self._bos = tokenizer.bos_token or ""
        self._around = _added_around(tokenizer) if multimodal else ((), ())
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
        messages = self._with_frames(messages)
        shape = shape_of(messages, tools)
        if not all(self._encoder.clean(text) for text in shape.texts):
            raise Refused("control_token_in_text", "the text holds a private-use character in use as a marker")
        key = (shape.key, add_generation_prompt)
        program = self._programs.get(key)
        if program is None:
            program = self._compile(messages, tools, add_generation_prompt)
            self._programs[key] = program
            if len(self._programs) > 512:
                self._programs.popitem(last=False)
        return self._run(program, shape.texts, media_of(messages))

    def _with_frames(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Shows each video as sampled frames."""
        if not any(part.modality == "video" for part in media_of(messages)):
            return messages
        shown = []
        for message in messages:
            parts: list[TextPart | Medium] = []
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

    def _expand(self, medium: Medium, images: int) -> list[str | Block]:
        """Returns the text and control ids that stand for one medium."""
        text = self.counter.expansion(medium, images)
        if text not in self._expansions:
            if len(self._expansions) >= 4096:
                self._expansions.clear()
            self._expansions[text] = self.control.parse(text, placeholders=False)
        return self._expansions[text]

    def _compile(self, messages: Sequence[Message], tools: str, generation_prompt: bool) -> _Program:
        media = media_of(messages)
        for medium in media:
            self.counter.placeholder(medium.modality)
        pieces = self._maker.pieces(messages, tools, generation_prompt)
        starts_with_bos = bool(self._bos) and "".join(piece.text for piece in pieces[:1]).startswith(self._bos)
        # The tokenizer adds these ids after encoding, so they are no part of the string.
        around = ((), ()) if starts_with_bos else self._around
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
                    ops.append(("ids", part.ids, part.flags, piece.loss))
        if shown != len(media):
            raise Refused("template_refused", f"the chat template shows {shown} of {len(media)} media")
        return _Program(ops, *around)

    def _run(self, program: _Program, texts: Sequence[str], media: Sequence[Medium]) -> EncodedRow:
        out: list[str] = []
        length = 0
        blocks: list[Any] = []
        losses: list[tuple[int, int]] = []
        spans: list[tuple[int, int]] = []
        images = sum(medium.modality == "image" for medium in media)

        def put(text: str, loss: bool) -> None:
            nonlocal length
            out.append(text)
            if loss:
                losses.append((length, length + len(text)))
            length += len(text)

        for op in program.ops:
            if op[0] == "text":
                put(op[1], op[2])
            elif op[0] == "slot":
                put(escaped(texts[op[1]], op[3]), op[2])
            elif op[0] == "ids":
                blocks.append(op[1])
                put(self._encoder.markers[op[2]], op[3])
            else:
                medium = media[op[1]]
                begin = length
                for part in self._expand(medium, images):
                    if isinstance(part, Block):
                        blocks.append(part.ids)
                        put(self._encoder.markers[part.flags], False)
                    else:
                        put(part, False)
                spans.append((begin, length))
        return self._finish(program, "".join(out), blocks, losses, spans, media)

    def _finish(
        self,
        program: _Program,
        text: str,
        blocks: list[Any],
        losses: list[tuple[int, int]],
        spans: list[tuple[int, int]],
        media: Sequence[Medium],
    ) -> EncodedRow:
        encoded = self._encoder.encode(text, blocks)
        if encoded is None:
            raise Refused("control_token_in_text", "the vocabulary turns a text into a control token")
        ids = np.asarray([*program.before, *encoded[0], *program.after], dtype=np.int32)
        places = [*[_NOWHERE] * len(program.before), *encoded[1], *[_NOWHERE] * len(program.after)]
        chars = np.asarray(places, dtype=np.int64).reshape(-1, 2)
        bears = np.zeros(ids.size, dtype=bool)
        for begin, end in losses:
            # A token belongs to where its last character stands.
            bears |= (chars[:, 1] > begin) & (chars[:, 1] <= end)
        found = []
        for (begin, end), medium in zip(spans, media, strict=True):
            inside = np.flatnonzero((chars[:, 1] > begin) & (chars[:, 0] < end))
            first, count = (int(inside[0]), int(inside.size)) if inside.size else (0, 0)
            is_frame = medium.fps < 0
            source = replace(medium, modality="video", fps=0.0) if is_frame else medium
            frame, frames = (int(-1 - medium.fps), self._frames(source)) if is_frame else (0, 0)
            found.append(MediaSpan(source, first, count, frame, frames))
        return EncodedRow(ids, np.where(bears, ids, IGNORED).astype(np.int32), tuple(found))


def _added_around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the ids that the tokenizer's post-processor puts before and after any text."""
    with_added = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(with_added) - len(bare) + 1):
        if with_added[start : start + len(bare)] == bare:
            return tuple(with_added[:start]), tuple(with_added[start + len(bare) :])
    return (), ()
