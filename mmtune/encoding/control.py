"""Which tokens are structure, and a tokenizer that cannot produce them from text.

A control token is an added token that is special, is a media token, stands in the chat
template, or is shaped ``<|...|>``. Text is encoded by a copy of the tokenizer that does not
know these, and in which each stands as one private marker, so the text around it is cut
exactly where the real tokenizer cuts it.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmtune.encoding.processor import chat_template_of, tokenizer_of
from mmtune.encoding.refused import Refused
from mmtune.errors import CapabilityError
from mmtune.records import MODALITIES

_MEDIA_ATTRIBUTES = re.compile(r"(^|_)(image|video|audio|behaviour|boi|eoi|boa|eoa|vision)\w*_token$|_tag$")
_CACHED_RUNS = 1 << 14
_CACHED_CHARACTERS = 200
_SHAPED = re.compile(r"^<\|.*\|>$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ControlToken:
    """A structural token and how it treats the spaces beside it."""

    text: str
    id: int
    lstrip: bool
    rstrip: bool


@dataclass(frozen=True, slots=True)
class Block:
    """Control ids that stand together, or the place of a medium (``placeholder`` set)."""

    ids: tuple[int, ...]
    flags: tuple[bool, bool] = (False, False)
    placeholder: str = ""


class ControlTokens:
    """The control tokens of a processor, and the way to find them in control text.

    Attributes:
        by_text: Control tokens by their text.
    """

    def __init__(self, processor: Any) -> None:
        tokenizer = tokenizer_of(processor)
        template = chat_template_of(processor)
        names = {*dir(type(processor)), *vars(processor)}
        media = {
            value
            for name in sorted(names)
            if _MEDIA_ATTRIBUTES.search(name) and isinstance(value := getattr(processor, name, None), str)
        }
        self.by_text: dict[str, ControlToken] = {}
        for identifier, token in tokenizer.added_tokens_decoder.items():
            text = token.content
            blank = not text.replace("▁", "").strip()
            structural = token.special or text in media or text in template or _SHAPED.match(text)
            if structural and not blank:
                self.by_text[text] = ControlToken(text, identifier, token.lstrip, token.rstrip)
        media_tokens = (getattr(processor, f"{modality}_token", None) for modality in MODALITIES)
        self._placeholders = [text for text in media_tokens if isinstance(text, str)]
        known = sorted({*self.by_text, *self._placeholders}, key=len, reverse=True)
        self._pattern = re.compile("|".join(re.escape(text) for text in known) or r"(?!)")

    def parse(self, text: str, placeholders: bool) -> list[str | Block]:
        """Splits control text into plain text and blocks; a run of one token is one block.

        Args:
            text: Text of a template or of a processor, never of a user.
            placeholders: Whether a media token is the place of a medium or a plain id.
        """
        pieces: list[str | Block] = []
        at = 0
        for match in self._pattern.finditer(text):
            found = match.group()
            token = self.by_text.get(found)
            place = placeholders and found in self._placeholders
            if token is None and not place:
                continue
            if match.start() > at:
                pieces.append(text[at : match.start()])
            last = pieces[-1] if pieces and at == match.start() else None
            at = match.end()
            if place:
                pieces.append(Block((), placeholder=found))
            elif token is not None and isinstance(last, Block) and last.ids[-1:] == (token.id,):
                pieces[-1] = Block((*last.ids, token.id), last.flags)
            elif token is not None:
                pieces.append(Block((token.id,), (token.lstrip, token.rstrip)))
        return [*pieces, text[at:]] if at < len(text) else pieces

    def ends(self, text: str) -> tuple[int, int]:
        """Returns where the first run of control tokens ends, and the last control token.

        The run may follow white space (``yes </s>``); 0 where there is none.
        """
        first = last = 0
        for match in self._pattern.finditer(text):
            if match.group() in self._placeholders:
                break
            gap = text[first : match.start()]
            if not gap or (not last and gap.isspace()):
                first = match.end()
            last = match.end()
        return first, last


Flags = tuple[bool, bool]
Encoded = tuple[np.ndarray, np.ndarray]


class TextEncoder:
    """Encodes runs of text between control tokens, text never becoming control.

    A tokenizer cuts a string at its added tokens before anything else, so a run depends on
    nothing but itself and the tokens at its two sides; these are stood for by private markers.

    Args:
        processor: The family's processor or tokenizer.
        control: Its control tokens.
    """

    def __init__(self, processor: Any, control: ControlTokens) -> None:
        from tokenizers import AddedToken, Tokenizer

        controls = control.by_text
        tokenizer = tokenizer_of(processor)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise CapabilityError(
                f"the tokenizer {type(tokenizer).__name__} has no fast form (tokenizer.json)",
                "choose a model with a tokenizer.json",
                "slow_tokenizer",
            )
        spec = json.loads(backend.to_str())
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in controls]
        spec["post_processor"] = None
        spec["truncation"] = spec["padding"] = None
        self._clone = Tokenizer.from_str(json.dumps(spec))
        # The unknown token stands for any letter that the vocabulary lacks; it controls nothing.
        self._control_ids = {token.id for token in controls.values()} - {tokenizer.unk_token_id}
        # Characters of a private-use plane, drawn anew each time, so no data can aim at them.
        start = 0xF0000 + secrets.randbelow(0xF000)
        self._markers: dict[Flags | None, str] = {None: ""}
        for offset, flags in enumerate([(left, right) for left in (False, True) for right in (False, True)]):
            self._markers[flags] = chr(start + offset)
            token = AddedToken(chr(start + offset), lstrip=flags[0], rstrip=flags[1], normalized=False)
            self._clone.add_special_tokens([token])
        # Ids of the copy that differ from the real ones (kept added tokens may have moved).
        moved = {self._clone.token_to_id(token["content"]): token["id"] for token in spec["added_tokens"]}
        self._moved = {here: real for here, real in moved.items() if here != real}
        self._hostile = re.compile(f"[{chr(start)}-{chr(start + 3)}]")
        self._cache: dict[tuple[str, Flags | None, Flags | None, bool], Encoded] = {}

    def clean(self, text: str) -> bool:
        """Says whether a text is free of the private markers."""
        return self._hostile.search(text) is None

    def encode(self, text: str, left: Flags | None, right: Flags | None) -> np.ndarray:
        """Returns the ids ``(T,)`` of a run.

        Args:
            text: A run without control tokens.
            left: ``lstrip`` and ``rstrip`` of the control token before it; None at the start.
            right: The same of the one after it; None at the end.

        Raises:
            Refused: The vocabulary itself turns the text into a control token.
        """
        return self._look_up((text, left, right, False))[0]

    def encode_with_ends(self, text: str, left: Flags | None, right: Flags | None) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids ``(T,)`` of a run, and after which character ``(T,)`` each ends."""
        return self._look_up((text, left, right, True))

    def _look_up(self, key: tuple[str, Flags | None, Flags | None, bool]) -> Encoded:
        found = self._cache.get(key)
        if found is None:
            found = self._encode(*key)
            if len(key[0]) <= _CACHED_CHARACTERS:
                if len(self._cache) >= _CACHED_RUNS:
                    self._cache.clear()
                self._cache[key] = found
        return found

    def _encode(self, text: str, left: Flags | None, right: Flags | None, ends: bool) -> Encoded:
        before, after = self._markers[left], self._markers[right]
        encoding = self._clone.encode(f"{before}{text}{after}", add_special_tokens=False)
        found = encoding.ids
        inside = slice(len(before), len(found) - len(after))
        ids = [self._moved.get(index, index) for index in found[inside]] if self._moved else found[inside]
        if not self._control_ids.isdisjoint(ids):
            raise Refused("control_token_in_text", "the vocabulary turns a text into a control token")
        # Places cost as much as ids, and only runs with an answer in them need any.
        places = [place[1] - len(before) for place in encoding.offsets[inside]] if ends else ()
        return np.array(ids, dtype=np.int32), np.array(places, dtype=np.int64)
