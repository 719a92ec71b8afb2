"""A searched prompt put into rows: the one way, whoever asks (the search, build-data, eval).

The instruction of a searched prompt is a template whose slots are those of the shipped ones, and ``{prompt}``: what
the row's own template says. Its exemplars are whole rows, so that the file needs nothing else.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmtune.errors import DataError
from mmtune.media.content import own_name
from mmtune.prompts.forms import options_list, slot_values
from mmtune.prompts.schema import COLUMN, example_to_row, row_to_example
from mmtune.records import IN_FILES, Example, Medium, Message, Part, Record, Reject, TextPart, merged

SCHEMA = "mmtune.prompt/1"
SOFT = "soft"
"""Folder within prompt/ that holds the soft tokens of a searched prompt, a PEFT adapter of method prompt."""
_WITH_BYTES = tuple(COLUMN[modality] for modality in IN_FILES)
SLOTS = "slots"
"""Metadata key with a row's slots as JSON: what a searched instruction may name beside ``{prompt}``."""
_PIECE = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*)\}")
_KEPT = ("question", "context", "types")
_ANSWERS = ("answer", "target")


@dataclass(frozen=True)
class SearchedPrompt:
    """A prompt that a search found, complete.

    Attributes:
        instruction: Template text with slots.
        exemplars: Solved rows shown before every question, the first shown first.
        words: Label to the word that stands for it; empty leaves the labels as they are.
        soft: Place of the soft tokens before every row in the subspace they were searched in; empty where there are
            none. The tokens themselves are an adapter.
    """

    instruction: str
    exemplars: tuple[Example, ...] = ()
    words: Mapping[str, str] = field(default_factory=dict)
    soft: tuple[float, ...] = ()

    @property
    def media(self) -> tuple[Medium, ...]:
        """The media of its exemplars."""
        return tuple(medium for one in self.exemplars for medium in one.media)

    def label_of(self, text: str) -> str:
        """Returns the label that an answer means, or the answer itself where it is no word of a label."""
        said = _folded(text)
        return next((label for label, word in self.words.items() if _folded(word) == said), text)


def slots_text(record: Record) -> str:
    """Returns the slots of a record as JSON, for ``metadata``; its answer is not among them."""
    values = slot_values(replace(record, target="", references=()))
    return json.dumps({name: values[name] for name in _KEPT if name in values}, ensure_ascii=False)


def slot_names(example: Example) -> frozenset[str]:
    """Returns the names that an instruction for this row may use."""
    names = {"prompt", *_slots(example, {})}
    return frozenset(names | {"media"} if example.media else names)


def context_of(metadata: Mapping[str, str]) -> str:
    """Returns the context of a row that keeps its slots, as its question says it; empty where it has none."""
    context: str = json.loads(metadata.get(SLOTS, "{}")).get("context", "")
    return context


def shortenable(example: Example) -> str:
    """Returns what a row says that may lose its end where it does not fit: its context."""
    return context_of(example.metadata)


def asked_with(prompt: SearchedPrompt, example: Example, name: Callable[[Medium], str] = own_name) -> Example | Reject:
    """Returns a row as a searched prompt asks it, its answer and references in the prompt's words.

    An exemplar that is the row itself, says the same, or shows one of its media is left out for this row.

    Args:
        prompt: The prompt.
        example: A row of instructions/ whose last user turn is what is asked.
        name: Medium to a name that equal media share.
    """
    asked = _rewritten(prompt, example, train=True)
    if isinstance(asked, Reject):
        return asked
    shown: list[Message] = []
    ids = []
    for exemplar in prompt.exemplars:
        if _shares(exemplar, example, name):
            continue
        solved = _rewritten(prompt, exemplar, train=False)
        if isinstance(solved, Example):
            shown += [message for message in solved.messages if message.role != "system"]
            ids.append(exemplar.id)
    at = next((at for at, message in enumerate(asked.messages) if message.role != "system"), len(asked.messages))
    messages = (*asked.messages[:at], *shown, *asked.messages[at:])
    return replace(asked, messages=messages, exemplar_ids=(*ids, *asked.exemplar_ids))


def _rewritten(prompt: SearchedPrompt, example: Example, *, train: bool) -> Example | Reject:
    """Returns a row whose last question is worded by the instruction."""
    places = [at for at, message in enumerate(example.messages) if message.role == "user"]
    if not places:
        return Reject(example.split, example.id, "no_question", "the row has no user turn to put the prompt into")
    at, words = places[-1], prompt.words
    values = _slots(example, words)
    parts = _parts(prompt.instruction, example.messages[at].parts, values, _relisted(example, words))
    if isinstance(parts, str):
        return Reject(
            example.split, example.id, "missing_field", f"the searched prompt names {parts}; the row has none"
        )
    messages = list(example.messages)
    messages[at] = replace(messages[at], parts=parts)
    for after in range(at + 1, len(messages)):
        if messages[after].role == "assistant":
            said = tuple(
                TextPart(words.get(part.text, part.text)) if isinstance(part, TextPart) else part
                for part in messages[after].parts
            )
            messages[after] = replace(messages[after], parts=said, train=train and messages[after].train)
    return replace(
        example,
        messages=tuple(messages),
        references=tuple(words.get(text, text) for text in example.references),
        options=tuple(words.get(text, text) for text in example.options),
        metadata=_free(prompt, example),
    )


def _parts(
    instruction: str, parts: Sequence[Part], values: Mapping[str, str], relisted: Mapping[str, str]
) -> tuple[Part, ...] | str:
    """Returns the parts of a question, or the name of a slot that the row has no value for."""
    media = [part for part in parts if isinstance(part, Medium)]
    own = [TextPart(_replaced(part.text, relisted)) if isinstance(part, TextPart) else part for part in parts]
    names = set(_PIECE.findall(instruction))
    out: list[Part] = []
    if "media" in names or "prompt" not in names:
        inner: list[Part] = [part for part in own if isinstance(part, TextPart)]
        out += [] if "media" in names else media
    else:
        # What a row shows first stays first, so that rows of one picture still share it.
        leading = next((at for at, part in enumerate(own) if isinstance(part, TextPart)), len(own))
        out, inner = [*own[:leading]], own[leading:]
    end = 0
    for match in _PIECE.finditer(instruction):
        out.append(TextPart(instruction[end : match.start()]))
        end, name = match.end(), match.group(1)
        if name is None:
            out.append(TextPart(match.group(0)[0]))
        elif name == "prompt":
            out += inner
        elif name == "media":
            out += media
        elif name in values:
            out.append(TextPart(values[name]))
        else:
            return name
    out.append(TextPart(instruction[end:]))
    return merged(out)


def _slots(example: Example, words: Mapping[str, str]) -> dict[str, str]:
    kept = json.loads(example.metadata.get(SLOTS, "{}"))
    record = Record(
        id=example.id,
        source=example.source,
        task=example.task,
        split=example.split,
        text=kept.get("question", ""),
        context=kept.get("context", ""),
        options=tuple(words.get(text, text) for text in example.options),
        fields={"types": kept["types"]} if "types" in kept else {},
    )
    return {name: value for name, value in slot_values(record).items() if name not in _ANSWERS}


def _relisted(example: Example, words: Mapping[str, str]) -> dict[str, str]:
    """Returns the lists of options that a template may have written out, each to the same list in other words."""
    if not words or not example.options:
        return {}
    other = tuple(words.get(text, text) for text in example.options)
    return {options_list(example.options): options_list(other), ", ".join(example.options): ", ".join(other)}


def _replaced(text: str, changes: Mapping[str, str]) -> str:
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


def _free(prompt: SearchedPrompt, example: Example) -> Mapping[str, str]:
    """Returns the metadata of a row, its content-free question worded by the instruction too."""
    free = example.metadata.get("content_free")
    if free is None:
        return example.metadata
    names = set(_PIECE.findall(prompt.instruction)) - {"", "prompt", "options", "options_", "media"}
    if names:
        # The slots of a text without content are not kept; what cannot be worded cannot calibrate.
        return {key: value for key, value in example.metadata.items() if key != "content_free"}
    values = _slots(example, prompt.words)
    parts = _parts(prompt.instruction, (TextPart(free),), values, _relisted(example, prompt.words))
    assert not isinstance(parts, str)
    return {**example.metadata, "content_free": "".join(part.text for part in parts if isinstance(part, TextPart))}


def _shares(exemplar: Example, example: Example, name: Callable[[Medium], str]) -> bool:
    if exemplar.id == example.id:
        return True
    if not example.media and not exemplar.media:
        return _question(exemplar) == _question(example)
    return bool({name(one) for one in exemplar.media} & {name(one) for one in example.media})


def _question(example: Example) -> str:
    return example.metadata.get(SLOTS) or next(
        (message.text for message in reversed(example.messages) if message.role == "user"), ""
    )


def _folded(text: str) -> str:
    return text.strip().strip(".!,;:\"'").casefold()


def moved(prompt: SearchedPrompt, media_root: str, new_root: str) -> SearchedPrompt:
    """Returns the same prompt whose exemplars' media are relative to another folder above them.

    Args:
        prompt: Its media lie below ``media_root``.
        media_root: Where they are relative to now.
        new_root: Where they shall be relative to.

    Raises:
        DataError: They do not lie below the new folder.
    """

    def place(part: Part) -> Part:
        if not isinstance(part, Medium) or not part.path:
            return part
        path = os.path.relpath(os.path.join(media_root, part.path), new_root).replace(os.sep, "/")  # noqa: PTH118
        if path.startswith("../"):
            raise DataError(
                f"an exemplar of the searched prompt shows {part.path} of {media_root}, which is not below {new_root}",
                "search again on this data, or leave exemplars out of prompt.space",
                "media_elsewhere",
            )
        return replace(part, path=path)

    exemplars = tuple(
        replace(
            one, messages=tuple(replace(turn, parts=tuple(place(part) for part in turn.parts)) for turn in one.messages)
        )
        for one in prompt.exemplars
    )
    return replace(prompt, exemplars=exemplars)


def prompt_facts(prompt: SearchedPrompt) -> dict[str, Any]:
    """Returns a searched prompt as JSON."""
    rows = [example_to_row(one) for one in prompt.exemplars]
    for row in rows:
        for column in _WITH_BYTES:
            row[column] = [{**item, "bytes": _packed(item["bytes"])} for item in row[column]]
    soft = {"soft": list(prompt.soft)} if prompt.soft else {}
    return {"instruction": prompt.instruction, "words": dict(prompt.words), "exemplars": rows, **soft}


def read_prompt(path: Path) -> tuple[SearchedPrompt, str]:
    """Returns the prompt of a ``prompt.json``, and the folder that its media paths are relative to.

    Raises:
        DataError: The file is not there, or holds no searched prompt.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
        if value["schema"] != SCHEMA:
            raise ValueError(f"schema {value['schema']!r}, expected {SCHEMA!r}")
        found = value["prompt"]
        if not isinstance(found["instruction"], str):
            raise ValueError("its instruction is no text")
        rows = [_unpacked(row) for row in found["exemplars"]]
        words = {str(label): str(word) for label, word in found["words"].items()}
        exemplars = tuple(row_to_example(row) for row in rows)
        soft = tuple(float(place) for place in found.get("soft", ()))
        return SearchedPrompt(found["instruction"], exemplars, words, soft), str(value["media_root"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no searched prompt: {error}", "give the prompt.json that `mmtune prompt` wrote", "bad_prompt"
        ) from error


def _packed(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode("ascii")


def _unpacked(row: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(row)
    for column in _WITH_BYTES:
        out[column] = [
            {**item, "bytes": None if item["bytes"] is None else base64.b64decode(item["bytes"])}
            for item in row[column]
        ]
    return out
