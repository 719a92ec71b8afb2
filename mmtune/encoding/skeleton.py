"""The control text around a conversation's texts, rendered once per structure.

The family's own template is rendered with every text replaced by a sentinel; what stands
between the sentinels is structure. Leading and trailing whitespace stays outside the
sentinel, so a template that trims sees what it would see in the real text. The rendering
depends on the structure alone, hence one rendering serves all rows of the same shape.
"""

from __future__ import annotations

import re
import secrets
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mmtune.encoding.leaves import leaves_of, probe_mode, probed, with_leaves
from mmtune.encoding.refused import Refused
from mmtune.errors import RecipeError
from mmtune.records import Medium, Message, Part, SoftPart, TextPart

_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of a skeleton: control text (``slot`` is -1) or the place of a text.

    Attributes:
        text: The control text; empty for a slot.
        slot: Index of the text that goes here, or -1.
        message: For a slot, the index of its message.
        loss: Whether the run belongs to a trained assistant turn.
        form: How the template writes this text: ``raw``, ``json`` or ``ascii`` (escaped JSON).
    """

    text: str
    slot: int
    message: int
    loss: bool
    form: str = "raw"


@dataclass(frozen=True, slots=True)
class Shape:
    """A conversation's structure, and its texts.

    Attributes:
        key: Hashable structure; equal keys render alike.
        texts: Cores of the non-empty texts and soft tokens, in order of the slots.
        owners: Message index of each text.
    """

    key: tuple[Any, ...]
    texts: tuple[str | SoftPart, ...]
    owners: tuple[int, ...]


def shape_of(messages: Sequence[Message], tools: str) -> Shape:
    """Returns the structure of a conversation apart from its texts."""
    texts: list[str | SoftPart] = []
    owners: list[int] = []
    key: list[Any] = []

    def hide(strings: Sequence[str], message: int) -> None:
        texts.extend(strings)
        owners.extend([message] * len(strings))

    if tools:
        structure, strings = leaves_of(tools)
        key.append(structure)
        hide(strings, -1)

    def slot(text: str, message: int) -> tuple[str, str, bool]:
        core = text.strip()
        if not core:
            return (text, "", False)
        texts.append(core)
        owners.append(message)
        if len(core) == len(text):
            return ("", "", True)
        start = text.index(core)
        return (text[:start], text[start + len(core) :], True)

    def shown(part: Part, message: int) -> Any:
        if isinstance(part, SoftPart):
            texts.append(part)
            owners.append(message)
            return ("", "", True)
        return slot(part.text, message) if isinstance(part, TextPart) else part.modality

    for index, message in enumerate(messages):
        reasoning = slot(message.reasoning, index)
        parts = tuple([shown(part, index) for part in message.parts])
        calls: list[str] = []
        for call in message.tool_calls:
            structure, strings = leaves_of(call.arguments)
            hide([call.name, *strings], index)
            calls.append(structure)
        if message.name:
            hide([message.name], index)
        key.append((message.role, reasoning, parts, tuple(calls), bool(message.name), message.train))
    return Shape(tuple(key), tuple(texts), tuple(owners))


@dataclass(frozen=True, slots=True)
class _Found:
    """One occurrence of a text in a rendering, in characters."""

    slot: int
    start: int
    end: int
    form: str


class SkeletonMaker:
    """Renders skeletons with the family's template in transformers' sandbox.

    Args:
        template: Text of the chat template.
        variables: Further variables of the template (special tokens).
        flat_content: Give text-only messages as plain strings, as text models' templates expect;
            None finds out what the template expects.
        control_end: Given text that follows an answer, where its first run of control tokens
            ends (0 if it does not begin with one), and where its last control token ends.
    """

    def __init__(
        self,
        template: str,
        variables: dict[str, Any],
        flat_content: bool | None,
        control_end: Callable[[str], tuple[int, int]],
    ) -> None:
        self._template, self._variables, self._control_end = template, variables, control_end
        nonce = secrets.token_hex(6)
        self._open, self._close = f"mq{nonce}n", f"mq{nonce}e"
        self._pattern = re.compile(rf"{self._open}(\d{{5}})qm")
        self._flat = self._wants_strings() if flat_content is None else flat_content

    def _wants_strings(self) -> bool:
        """Says whether a list of parts would come out as a Python list, or not at all."""
        for content in ([{"type": "text", "text": self._mark(0)}], self._mark(0)):
            try:
                rendered = self._render([{"role": "user", "content": content}], None, False)
            except Refused:
                continue
            if self._mark(0) in rendered and "'type'" not in rendered:
                return isinstance(content, str)
        return False

    def _mark(self, slot: int) -> str:
        return f"{self._open}{slot:05d}qm"

    def pieces(self, messages: Sequence[Message], tools: str, generation_prompt: bool) -> list[Piece]:
        """Returns the runs of the rendered conversation, in order.

        Raises:
            Refused: A text did not come through whole and exactly once, or the template fails.
        """
        plain, hidden, owners, needed = self._plain(messages, tools)
        whole = self._render(plain, hidden, generation_prompt)
        found = self._occurrences(whole)
        counts = Counter(place.slot for place in found)
        for slot, need in enumerate(needed):
            if need and (not counts[slot] if need == "some" else counts[slot] != 1):
                detail = f"the chat template shows a text of turn {owners[slot] + 1} {counts[slot]} times"
                raise Refused("template_refused", detail)
        regions = []
        for index, message in enumerate(messages):
            if message.role == "assistant" and message.train:
                own = [place for place in found if owners[place.slot] == index]
                regions.append(self._region(plain, hidden, index, whole, own, bool(message.tool_calls)))
        return self._cut(whole, found, regions, owners)

    def _plain(self, messages: Sequence[Message], tools: str) -> tuple[list[dict[str, Any]], Any, list[int], list[str]]:
        """Returns messages and tools with hidden texts, and for each text its message and need."""
        owners: list[int] = []
        needed: list[str] = []

        def take(message: int, need: str) -> int:
            owners.append(message)
            needed.append(need)
            return len(owners) - 1

        def mark(text: str, message: int, need: str = "once", role: str = "") -> str:
            core = text.strip()
            if not core:
                return text
            slot = take(message, need)
            start = text.index(core)
            # A tool's output may be written as text or as JSON; the probe tells which.
            shown = self._probe(slot) if role == "tool" else self._mark(slot)
            return text[:start] + shown + text[start + len(core) :]

        def hide(text: str, message: int, need: str) -> Any:
            return with_leaves(text, lambda: self._probe(take(message, need)))

        hidden = hide(tools, -1, "") if tools else None
        out: list[dict[str, Any]] = []
        for index, message in enumerate(messages):
            plain: dict[str, Any] = {"role": message.role}
            if message.reasoning:
                # Templates drop earlier reasoning, so it need not show.
                plain["reasoning_content"] = mark(message.reasoning, index, "")
            parts = [
                {"type": part.modality}
                if isinstance(part, Medium)
                # Soft tokens stand where a text of one mark would.
                else {"type": "text", "text": mark(_words(part), index, role=message.role)}
                for part in message.parts
            ]
            only_text = all(part["type"] == "text" for part in parts)
            plain["content"] = "".join(part["text"] for part in parts) if self._flat and only_text else parts
            calls = []
            for call in message.tool_calls:
                name = self._probe(take(index, "some"))
                calls.append({"name": name, "arguments": hide(call.arguments, index, "some")})
            if calls:
                plain["tool_calls"] = [{"type": "function", "function": call} for call in calls]
            if message.name:
                plain["name"] = self._probe(take(index, ""))
            out.append(plain)
        return out, hidden, owners, needed

    def _probe(self, slot: int) -> str:
        return f"{self._mark(slot)}{probed()}{self._close}{slot:05d}qm"

    def _occurrences(self, whole: str) -> list[_Found]:
        found = []
        for match in self._pattern.finditer(whole):
            slot = int(match.group(1))
            closing = f"{self._close}{slot:05d}qm"
            end = whole.find(closing, match.end(), match.end() + 40 + len(closing))
            if end < 0:
                found.append(_Found(slot, match.start(), match.end(), "raw"))
                continue
            form = probe_mode(whole[match.end() : end])
            if not form:
                raise Refused("template_refused", "the chat template writes a tool's text in an unknown form")
            found.append(_Found(slot, match.start(), end + len(closing), form))
        return found

    def _render(self, plain: list[dict[str, Any]], tools: Any, generation_prompt: bool) -> str:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with time_limit(_SECONDS):
                rendered = render_jinja_template(
                    conversations=[plain],
                    tools=tools,
                    chat_template=self._template,
                    add_generation_prompt=generation_prompt,
                    **self._variables,
                )[0]
        except jinja2.TemplateError as error:
            raise Refused("template_refused", f"the chat template refuses this: {error.message or error}") from error
        except TimeoutError as error:
            raise RecipeError(
                f"the chat template does not end within {_SECONDS:g} seconds", "use another model", "template_hangs"
            ) from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise Refused("template_refused", f"the chat template fails on this: {error}") from error
        if not isinstance(rendered[0], str):
            raise RecipeError("the chat template did not return text", "use another chat template")
        return rendered[0]

    def _region(
        self, plain: list[dict[str, Any]], tools: Any, index: int, whole: str, own: Sequence[_Found], calls: bool
    ) -> tuple[int, int]:
        """Returns the characters of an assistant turn that the model itself must produce.

        It begins where the generation prompt ends, if that is a prefix of the whole, else at
        the turn's first text. It ends with the control tokens that close the turn: those that
        follow its last text both here and where the conversation ends with it.
        """
        if not own:
            return (0, 0)
        begin, end = own[0].start, own[-1].end
        try:
            opened = self._render(plain[:index], tools, True) if index else ""
            closed = self._render(plain[: index + 1], tools, False)
        except Refused:
            opened = closed = ""
        if opened and whole.startswith(opened) and len(opened) <= begin:
            begin = len(opened)
        last = self._occurrences(closed)
        same = last and last[-1].slot == own[-1].slot
        after = closed[last[-1].end :] if same else whole[end:]
        tail = after[: _shared(after, whole[end:])]
        first_run, last_token = self._control_end(tail)
        return (begin, end + (last_token if calls else first_run))

    def _cut(
        self, whole: str, found: Sequence[_Found], regions: list[tuple[int, int]], owners: list[int]
    ) -> list[Piece]:
        pieces: list[Piece] = []
        at = 0
        for place in found:
            pieces += self._control(whole, at, place.start, regions)
            inside = any(begin <= place.start < end for begin, end in regions)
            pieces.append(Piece("", place.slot, owners[place.slot], inside, place.form))
            at = place.end
        return pieces + self._control(whole, at, len(whole), regions)

    def _control(self, whole: str, start: int, end: int, regions: list[tuple[int, int]]) -> list[Piece]:
        edges = sorted({start, end, *(edge for region in regions for edge in region if start < edge < end)})
        return [
            Piece(whole[a:b], -1, -1, any(begin <= a and b <= stop for begin, stop in regions))
            for a, b in pairwise(edges)
            if b > a
        ]


def media_of(messages: Sequence[Message]) -> list[Medium]:
    """Returns the media of a conversation in reading order."""
    return [part for message in messages for part in message.parts if isinstance(part, Medium)]


def _words(part: TextPart | SoftPart) -> str:
    return "soft" if isinstance(part, SoftPart) else part.text


def _shared(one: str, other: str) -> int:
    """Returns how many leading characters two texts share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, pair in pairs if pair[0] != pair[1]), min(len(one), len(other)))


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in a block that runs longer; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def expire(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
