"""What the conversation formats share: roles, placeholders, and when a conversation is usable."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmtune.readers.fields import as_list, as_object, kind, media_of, missing, record_id, scalar_text
from mmtune.readers.histories import history_items
from mmtune.readers.source import Refused, Row, SourceFiles
from mmtune.records import MODALITIES, Medium, Message, Modality, Part, Record, Role, TextPart, ToolCall, history

ROLE_NAMES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Role names of the formats to ours."""

PLACEHOLDER = re.compile(rf"<({'|'.join(MODALITIES)})>")
_MEDIA_KEYS: dict[Modality, tuple[str, ...]] = {
    "image": ("images", "image"),
    "audio": ("audios", "audio"),
    "video": ("videos", "video"),
    "behaviour": ("histories",),
}


_WEIGHT_KEYS = ("weight", "loss_weight", "loss_scale")
_LOSS_KEYS = ("train", "loss", *_WEIGHT_KEYS)
_DETAIL = "train_detail"


def role_of(value: Any, pointer: str) -> Role:
    """Returns our role for a format's role name."""
    if not isinstance(value, str) or value not in ROLE_NAMES:
        said = repr(value) if isinstance(value, str) else kind(value)
        raise Refused("bad_field", f"{pointer}: unknown role {said}; known: {', '.join(sorted(ROLE_NAMES))}")
    return ROLE_NAMES[value]


def is_taught(turn: Mapping[str, Any], role: Role, pointer: str) -> bool:
    """Says whether an assistant's turn bears loss: by ``train``, ``loss_weight``, ``weight`` or ms-swift's ``loss``.

    Turns of others bear none, and may say so.

    Raises:
        Refused: It says neither yes nor no, such as a weight of a half; a part of it alone bears loss
            (``train_detail`` of Axolotl); or a turn of somebody else should.
    """
    told = [(key, turn[key]) for key in _LOSS_KEYS if turn.get(key) is not None]
    for key, value in told:
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise Refused("bad_field", f"{pointer}/{key}: {value!r}; only true, false, 1 and 0 are read")
        if value and role != "assistant":
            raise Refused("bad_field", f"{pointer}/{key}: {value!r}; of {role} no turn is taught, only the assistant's")
    if turn.get(_DETAIL):
        raise Refused("bad_field", f"{pointer}/{_DETAIL}: a turn is taught as a whole or not at all")
    return role != "assistant" or all(value for _, value in told)


def turn_by_turn(turns: list[Any]) -> list[Any]:
    """Returns the turns, each ``{"human": ..., "assistant": ...}`` of ms-swift's ShareGPT rows as two."""
    out: list[Any] = []
    for turn in turns:
        pair = isinstance(turn, Mapping) and "human" in turn and "assistant" in turn
        out += [{"from": name, "value": turn[name]} for name in ("human", "assistant")] if pair else [turn]
    return out


# Where ms-swift fills in names and boxes of a row's `objects`, in a form that depends on the model.
_OBJECT_MARKS = ("<ref-object>", "<bbox>")


def media_columns(source: SourceFiles, row: Mapping[str, Any]) -> dict[Modality, list[Medium]]:
    """Returns the media that a row lists beside its turns, by modality."""
    strip = str(source.columns.get("strip", ""))
    found: dict[Modality, list[Medium]] = {}
    for modality in MODALITIES:
        named = source.columns.get(_MEDIA_KEYS[modality][0], source.columns.get(modality))
        keys = (str(named),) if named is not None else _MEDIA_KEYS[modality]
        found[modality] = [
            medium for key in keys if key in row for medium in _listed(row[key], modality, f"/{key}", strip)
        ]
    return found


def _listed(value: Any, modality: Modality, pointer: str, strip: str) -> tuple[Medium, ...]:
    if modality != "behaviour":
        return media_of(value, modality, pointer, strip)
    histories = as_list([] if value is None else value, pointer)
    return tuple(history(history_items(items, f"{pointer}/{at}")) for at, items in enumerate(histories))


class Placeholders:
    """Puts a row's media where its ``<image>``, ``<audio>``, ``<video>`` and ``<behaviour>`` stand.

    A placeholder in the user's and the tools' turns is one medium; the same characters in a
    system or assistant turn are text. The line break that formats put beside a placeholder
    belongs to it and is dropped.
    """

    def __init__(self, media: Mapping[Modality, Sequence[Medium]]) -> None:
        self._media = media
        self._used: dict[Modality, int] = dict.fromkeys(MODALITIES, 0)

    def parts(self, text: str) -> tuple[Part, ...]:
        """Returns text and media of one turn in reading order."""
        parts: list[Part] = []
        pieces = PLACEHOLDER.split(text)
        for at, piece in enumerate(pieces):
            if at % 2 == 0:
                words = piece.removeprefix("\n") if at > 0 else piece
                words = words.removesuffix("\n") if at < len(pieces) - 1 else words
                if words:
                    parts.append(TextPart(words))
            else:
                modality: Modality = piece  # type: ignore[assignment]
                if self._used[modality] < len(self._media[modality]):
                    parts.append(self._media[modality][self._used[modality]])
                self._used[modality] += 1
        return tuple(parts)

    def check(self, unmarked: str = "") -> None:
        """Raises Refused when placeholders and media are not as many; ``unmarked`` is told of images without any."""
        for modality in MODALITIES:
            placeholders, media = self._used[modality], len(self._media[modality])
            if placeholders != media:
                detail = f"{placeholders} <{modality}> placeholders but {media} {modality} file(s)"
                raise Refused("media_mismatch", detail + (unmarked if modality == "image" and not placeholders else ""))


def tool_calls_of(value: Any, pointer: str) -> tuple[ToolCall, ...]:
    """Returns the calls of ``{"name", "arguments"}`` or OpenAI's ``{"function": ...}``, a list, or their JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise Refused("bad_field", f"{pointer}: a tool call is not valid JSON") from error
    calls = value if isinstance(value, list) else [value]
    out = []
    for at, call in enumerate(calls):
        inner = as_object(call, f"{pointer}/{at}")
        inner = as_object(inner.get("function", inner), f"{pointer}/{at}/function")
        name, arguments = inner.get("name"), inner.get("arguments", {})
        if not isinstance(name, str) or not name:
            raise Refused("bad_field", f"{pointer}/{at}/name: expected a string, found {kind(name)}")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        out.append(ToolCall(name, text))
    return tuple(out)


def tools_text(value: Any) -> str:
    """Returns the tool schemas of a row as JSON text, empty for none."""
    if value is None or value == "" or value == []:
        return ""
    if isinstance(value, str):
        try:
            listed = json.loads(value)
        except ValueError as error:
            raise Refused("bad_field", "/tools: not valid JSON") from error
    else:
        listed = value
    if not isinstance(listed, list):
        raise Refused("bad_field", f"/tools: expected a list, found {kind(listed)}")
    return json.dumps(listed, ensure_ascii=False) if listed else ""


def check_turns(messages: Sequence[Message], pointer: str) -> None:
    """Raises Refused when a conversation cannot be taught."""
    if not messages:
        raise Refused("no_target", f"{pointer}: the conversation is empty")
    for at, message in enumerate(messages):
        if message.role == "system" and at > 0:
            twice = "a second system turn" if messages[0].role == "system" else "a system turn after the first turn"
            raise Refused("bad_field", f"{pointer}/{at}: {twice}")
        if message.role == "assistant" and not message.text.strip() and not message.tool_calls and not message.media:
            raise Refused("empty_answer", f"{pointer}/{at}: the assistant's turn is empty")
    if not any(message.role == "assistant" and message.train for message in messages):
        raise Refused("no_target", f"{pointer}: no assistant turn to learn from")


def taught_turns(source: SourceFiles, row: Mapping[str, Any], spellings: Sequence[str]) -> tuple[str, list[Any]]:
    """Returns where a row's turns stand, and the turns as they stand there.

    ``chosen`` beside a format's own key is the answer of turns that end without one. Without such a key the row is
    one of TRL's: ``prompt`` with ``chosen`` or ``completion`` is one conversation, and so is either of these alone, or
    as a list of turns beside a prompt that is a string, with which it begins. A string is one turn.

    Args:
        source: Its column map may name the key.
        row: The row.
        spellings: Other keys that are looked for, the format's own first.

    Raises:
        Refused: The row is marked as not to be learned, has no turns, or marks for objects that nobody fills in.
    """
    _check_row_is_taught(row)
    named = source.columns.get("messages")
    key = str(named) if named is not None else next((name for name in spellings if name in row), None)
    answer = next((name for name in ("chosen", "completion") if row.get(name) is not None), None)
    if key is None and answer is not None:
        return _answered(row, answer)
    key = key or spellings[0]
    if key not in row:
        raise missing(row, key)
    turns = list(as_list(row[key], f"/{key}"))
    if row.get("objects") and any(mark in str(turns) for mark in _OBJECT_MARKS):
        raise Refused(
            "bad_field",
            f"/objects: {' and '.join(_OBJECT_MARKS)} would be taught as these words: write the objects' names and"
            " boxes into the text, in the model's own form",
        )
    if row.get("chosen") is not None and not (turns and _is_answer(turns[-1])):
        turns += _turns_of(row["chosen"], "chosen", "assistant")
    return key, turns


def _check_row_is_taught(row: Mapping[str, Any]) -> None:
    no = next((key for key in ("label", "loss", "train") if row.get(key) is False), None)
    if no:
        raise Refused("not_preferred", f"/{no}: false; this answer is not one to learn")
    for key in _WEIGHT_KEYS:
        value = row.get(key)
        if not isinstance(value, int | float) or value == 1:
            continue
        if value == 0:
            raise Refused("not_preferred", f"/{key}: {value!r}; this row is not one to learn")
        raise Refused("bad_field", f"/{key}: {value!r}; rows are taught by a weight of 1 or 0: leave {key} out of them")


def _is_answer(turn: Any) -> bool:
    role = turn.get("from", turn.get("role")) if isinstance(turn, Mapping) else None
    return isinstance(role, str) and ROLE_NAMES.get(role) == "assistant"


def _answered(row: Mapping[str, Any], answer: str) -> tuple[str, list[Any]]:
    said, prompt = row[answer], row.get("prompt")
    if prompt is None and isinstance(said, str):
        raise missing(row, "prompt")
    if prompt is None or (isinstance(prompt, str) and isinstance(said, list | tuple)):
        return answer, _turns_of(said, answer, "assistant")
    return f"prompt+{answer}", [*_turns_of(prompt, "prompt", "user"), *_turns_of(said, answer, "assistant")]


def _turns_of(value: Any, key: str, role: Role) -> list[Any]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [value] if isinstance(value, Mapping) else as_list(value, f"/{key}")


def conversation(
    source: SourceFiles,
    row: Row,
    messages: Sequence[Message],
    *,
    pointer: str,
    own_id: Any = None,
    tools: str = "",
    metadata: Mapping[str, str] | None = None,
) -> Record:
    """Returns the Record of a ready conversation, after checking that it can be taught."""
    check_turns(messages, pointer)
    return Record(
        id=record_id(source, own_id, row),
        source=source.id,
        task="conversation",
        split=source.split,
        messages=tuple(messages),
        tools=tools,
        metadata=dict(metadata or {}),
        where=row.where,
    )


def row_metadata(row: Mapping[str, Any], keys: Sequence[str]) -> dict[str, str]:
    """Returns the scalar fields among ``keys`` as text, for grouping scores."""
    return {
        key: scalar_text(row[key], f"/{key}")
        for key in keys
        if isinstance(row.get(key), str | int | float) and row[key] != ""
    }
