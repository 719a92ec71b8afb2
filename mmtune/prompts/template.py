"""A Record becomes an Example: a wording of its task, drawn per row by its id.

The draw depends on the seed and the row's own id (for captions on the image), never on the
order of rows or the number of processes.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from mmtune.errors import RecipeError
from mmtune.prompts.exemplars import Order, shown_ranks
from mmtune.prompts.forms import (
    MEDIA,
    Filled,
    Render,
    Template,
    fill_slots,
    missing_slots,
    raw_values,
    slot_values,
)
from mmtune.prompts.pool_media import MEDIA_POOLS
from mmtune.prompts.pool_text import TEXT_POOLS
from mmtune.records import Example, Medium, Message, Modality, Part, Record, Reject, TextPart, parts_of

POOLS: dict[str, tuple[Template, ...]] = {**MEDIA_POOLS, **TEXT_POOLS}
"""Pool to its wordings; the first is the one of ``templates: first``."""

TASKS = (*(name for name in POOLS if name not in ("label_options", "choice", "recommendation_shown")), "conversation")
"""Every task that a source may name."""

METRICS = {
    "vqa": "vqa_accuracy",
    "chart": "relaxed_accuracy",
    "count": "accuracy",
    "presence": "accuracy",
    "label": "accuracy",
}
"""Task to the metric its examples are scored with; the metrics of other tasks stand in ``evaluation``."""

OF_OPTIONS = ("count", "presence", "sentiment_analysis", "recommendation", "dialogue", "text")
"""Tasks whose pool is for rows with options too; those of other tasks are asked by ``choice`` and ``label_options``."""

_MANY_OPTIONS = 20
_LEAST_LEAK = 4
_NAMES_MEDIA = re.compile(r"\{\{\s*media\s*\}\}")
_THINK = "Think step by step, then give the answer."


@dataclass(frozen=True, slots=True)
class Style:
    """How one row is asked, beyond its wording.

    Attributes:
        options: Whether its options are listed; None leaves it to the drawn template.
        inverted: Ask for another part of the row than its answer.
        rationale: Teach the row's rationale before its answer.
    """

    options: bool | None = None
    inverted: bool = False
    rationale: bool = False


@dataclass(frozen=True, slots=True)
class Wordings:
    """The templates of a source.

    Attributes:
        draw: ``pool`` draws, ``first`` always takes the first that fits.
        name: One template for every row, by its id.
        file: Templates of a file, instead of the shipped ones.
    """

    draw: Literal["pool", "first"] = "pool"
    name: str | None = None
    file: tuple[Template, ...] = ()


def check_task(name: str) -> None:
    """Raises RecipeError with the nearest name unless a task is known."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise RecipeError(f"there is no task {name!r}", f"{guess}tasks: {', '.join(sorted(TASKS))}", "unknown_task")


def make_example(
    record: Record,
    *,
    seed: int = 0,
    wordings: Wordings = Wordings(),
    system: str = "",
    style: Style = Style(),
    exemplars: Sequence[Record] = (),
    order: Order = "nearest_first",
    render: Render | None = None,
) -> Example | Reject:
    """Returns the Example of a Record, or why there is nothing to teach.

    Args:
        record: What the reader found.
        seed: Of the template draw.
        wordings: Where its template comes from.
        system: System turn put first; a conversation's own system turn wins.
        style: How it is asked.
        exemplars: Solved rows shown before it, nearest first and in the same wording; a row that the wording does not
            fit is left out.
        order: How they stand.
        render: Renders ``jinja`` templates.
    """
    if record.messages:
        references = tuple(text for text in (_last_answer(record.messages),) if text)
        return _example(record, _with_system(record.messages, system), references, record.options, "none", "")
    if not (record.target or next(iter(record.references), "")).strip() and record.split == "train":
        return Reject(record.where, record.id, "no_target", "a training row needs an answer")
    if any(not option.strip() for option in record.options):
        return Reject(record.where, record.id, "empty_option", f"one of its {len(record.options)} options is empty")
    asked = _ask(record, seed, wordings, style, render)
    if isinstance(asked, Reject):
        return asked
    template, filled = asked
    shown = []
    for exemplar in exemplars:
        solved = _fill(template, exemplar, seed, render)
        if isinstance(solved, Filled) and solved.taught:
            shown.append((exemplar.id, _turns(exemplar, solved, style, train=False)))
    shown = [shown[rank] for rank in shown_ranks(order, len(shown), f"{seed}\0{record.id}")]
    turns = [*(turn for _, own in shown for turn in own), *_turns(record, filled, style)]
    metric = "accuracy" if template.raw and filled.options else _metric(record)
    made = _example(record, _with_system(tuple(turns), system), filled.references, filled.options, metric, template.id)
    return replace(made, exemplar_ids=tuple(name for name, _ in shown)) if shown else made


def _example(
    record: Record,
    messages: tuple[Message, ...],
    references: tuple[str, ...],
    options: tuple[str, ...],
    metric: str,
    template_id: str,
) -> Example:
    media = tuple(medium for message in messages for medium in message.media)
    opening = messages[0].text if messages and messages[0].role == "system" else ""
    return Example(
        id=record.id,
        source=record.source,
        task=record.task,
        split=record.split,
        messages=messages,
        references=references,
        metric=metric,
        options=options,
        template_id=template_id,
        group=group_key(media, opening + record.tools) if media else record.id,
        tools=record.tools,
        metadata=record.metadata,
    )


def choose_templates(record: Record, *, seed: int, wordings: Wordings, style: Style) -> list[Template]:
    """Returns the wordings that fit a record and its media, the drawn one first; captions of one image share theirs.

    The others follow in the pool's order: they take over where the drawn one says nothing of the
    row, as PromptSource's conditional templates do. An option style that no template has is left
    to the draw.

    Raises:
        KeyError: There is no template of that name.
    """
    if wordings.name is not None:
        return [template_names(wordings.file)[wordings.name]]
    values = _values(record, raw=bool(wordings.file))
    fit = _fitting(_pool_name(record, style), wordings.file, frozenset(values), _kinds(record), style)
    if wordings.draw == "first" or len(fit) < 2:
        return fit
    basis = record.id
    if record.task == "caption" and all(medium.path for medium in record.media):
        # The bare file names: the draw must not change when the media root does.
        basis = "\0".join((record.source, *(medium.path.rpartition("/")[2] for medium in record.media)))
    digest = hashlib.blake2b(f"{seed}\0{basis}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    at = int.from_bytes(digest, "big") % len(fit)
    return fit[at:] + fit[:at]


@lru_cache(maxsize=256)
def _fitting(
    pool: str, file: tuple[Template, ...], names: frozenset[str], media: frozenset[Modality], style: Style
) -> list[Template]:
    """Returns the templates of a file, or of a shipped pool, for rows that have values of some names and some media.

    Where the words of none fit all of the media, those that fit some of them are taken.
    """
    fit = [one for one in file or POOLS[pool] if one.inverted == style.inverted and not missing_slots(one, names)]
    fit = [one for one in fit if media or "media" not in one.slots]
    fit = [one for one in fit if not one.speaks_of or (media and media <= one.speaks_of)] or [
        one for one in fit if media & one.speaks_of
    ]
    if style.options is not None:
        fit = [one for one in fit if one.shows_options == style.options] or fit
    return fit


def _kinds(record: Record) -> frozenset[Modality]:
    return frozenset(medium.modality for medium in record.media)


def template_names(file: Sequence[Template] = ()) -> dict[str, Template]:
    """Returns every template by its id: those of a file, or the shipped ones."""
    return {template.id: template for pool in ((file,) if file else POOLS.values()) for template in pool}


def has_inverted(record: Record, wordings: Wordings) -> bool:
    """Says whether a record can be asked the other way round."""
    return bool(choose_templates(record, seed=0, wordings=replace(wordings, draw="first"), style=Style(inverted=True)))


def group_key(media: Sequence[Medium], context: str = "") -> str:
    """Returns a short hash that is equal for the same media in the same order (and system text)."""
    digest = hashlib.blake2b(context.encode("utf-8", "surrogatepass"), digest_size=12)
    for medium in media:
        content = (
            hashlib.sha256(medium.data).hexdigest() if medium.data is not None and not medium.path else medium.path
        )
        digest.update(f"\0{medium.modality}:{content}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _pool_name(record: Record, style: Style) -> str:
    few = 0 < len(record.options) <= _MANY_OPTIONS
    if record.task == "label" and not record.text:
        return "label_options" if few and style.options is not False else "label"
    own = record.task if record.task in POOLS and record.task != "label" else "instruction"
    if own == "recommendation" and "behaviour" in _kinds(record):
        # What the user chose is shown, and not told in the text, which is a question then.
        own = "instruction" if record.text else "recommendation_shown"
    # An inverted wording lists no options.
    listed = own not in OF_OPTIONS and style.options is not False and not style.inverted
    return "choice" if few and record.text and listed else own


def _values(record: Record, *, raw: bool) -> dict[str, Any]:
    return raw_values(record) if raw else slot_values(record)


def _ask(
    record: Record, seed: int, wordings: Wordings, style: Style, render: Render | None
) -> tuple[Template, Filled] | Reject:
    """Returns the first wording that says something of a record, and what it says."""
    templates = choose_templates(record, seed=seed, wordings=wordings, style=style)
    for template in templates:
        filled = _fill(template, record, seed, render)
        if isinstance(filled, Reject):
            return filled
        says = filled.prompt.strip() or record.media or template.id == "text_plain"
        if says and (filled.taught or record.split != "train"):
            return template, filled
    names = ", ".join(template.id for template in templates[:3]) or _why_none_fits(record, wordings.file)
    return Reject(record.where, record.id, "template_empty", f"no template says anything of this row: {names}")


def _why_none_fits(record: Record, file: Sequence[Template]) -> str:
    """Says which names of a file's first templates a row has no value for, where that is the reason."""
    values = _values(record, raw=True)
    missing = {one.id: ", ".join(missing_slots(one, values)) for one in file}
    named = [f"{name!r} names {slots}" for name, slots in missing.items() if slots][:3]
    if not named:
        return "there is none for its fields and media"
    return f"{'; '.join(named)}; the row has {', '.join(sorted(values))}"


def _fill(template: Template, record: Record, seed: int, render: Render | None) -> Filled | Reject:
    values = _values(record, raw=template.raw)
    if template.form == "slots":
        missing = missing_slots(template, values)
        if missing:
            detail = f"template {template.id!r} names {', '.join(missing)}; the row has {', '.join(sorted(values))}"
            return Reject(record.where, record.id, "missing_field", detail)
        filled = fill_slots(template, record, values)
        # What a file says is all that is said: it may name the context by the column that it comes from.
        if record.context and not ({"context", "dialogue"} & template.slots or template.inverted or template.raw):
            filled = replace(filled, prompt=f"{filled.prompt}\n\n{record.context}")
    else:
        assert render is not None, "a caller with Jinja templates gives what renders them"
        made = render(template, values, f"{seed}\0{record.id}\0{template.id}")
        if isinstance(made, Reject):
            return replace(made, where=record.where, id=record.id)
        filled = made
    places = filled.prompt.count(MEDIA)
    named = "media" in template.slots or _NAMES_MEDIA.search(template.prompt) is not None
    if record.media and places != 1 and (named or places):
        detail = f"template {template.id!r} shows the media {places} times, not once"
        return Reject(record.where, record.id, "media_dropped", detail)
    if not template.inverted and _leaks(filled, template, values):
        detail = f"template {template.id!r} says the answer in its question"
        return Reject(record.where, record.id, "answer_in_prompt", detail)
    return filled


def _leaks(filled: Filled, template: Template, values: Mapping[str, Any]) -> bool:
    """Says whether a prompt holds the answer although neither the template's words nor another field do."""
    answer = filled.taught
    if len(answer) < _LEAST_LEAK or filled.options or answer not in filled.prompt or answer in template.prompt:
        return False
    own = {answer, *filled.references}
    return not any(answer in text for text in _texts(values) if text.strip() not in own)


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [text for one in inner for text in _texts(one)]


def _turns(record: Record, filled: Filled, style: Style, *, train: bool = True) -> list[Message]:
    prompt, taught = filled.prompt, filled.taught
    if style.rationale and record.rationale:
        prompt = f"{prompt}\n{_THINK}"
        taught = f"{record.rationale.strip()}\nThe answer is {taught}"
    before, marked, after = prompt.partition(MEDIA)
    texts = (before, after) if marked else ("", before)
    parts: list[Part] = [*parts_of(texts[0]), *record.media, *parts_of(texts[1])]
    turns = [Message("user", tuple(parts))] if parts else []
    return [*turns, *([Message("assistant", (TextPart(taught),), train=train)] if taught else [])]


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
