"""A chunk of what a reader found to finished rows: media probed, a template applied, or a refusal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from mmtune.media.content import own_name
from mmtune.media.known import MediaPlace, MediumKey, Probe, Prober
from mmtune.media.probe import ProbeLimits
from mmtune.prompts.delimiters import DELIMITERS, TURNS, delimited
from mmtune.prompts.exemplars import Choose, Order
from mmtune.prompts.forms import MEDIA
from mmtune.prompts.jinja_process import JinjaProcess
from mmtune.prompts.mixture import Shares
from mmtune.prompts.overlap import example_keys
from mmtune.prompts.schema import example_to_row, instructions_schema
from mmtune.prompts.searched import SLOTS, SearchedPrompt, asked_with, slots_text
from mmtune.prompts.template import Style, Wordings, has_inverted, make_example, template_names
from mmtune.prompts.verbalizer import Verbalizer, verbalized
from mmtune.prompts.wordings import WORDINGS, Kept, wordings_text
from mmtune.records import Example, Medium, Record, Reject, marked

_ODD = re.compile("[\0\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A few items of one source.

    Attributes:
        source: Number of the source.
        place: Where its media lie.
        items: Records, and what the reader refused.
        exemplars: Id of a training row to its exemplars, nearest first; None leaves them to ``ChunkBuilder.choose``.
        homes: Training source to its number and where its media lie, for exemplars of other sources.
    """

    source: int
    split: str
    place: MediaPlace
    items: tuple[Record | Reject, ...]
    exemplars: Mapping[str, tuple[Record, ...]] | None = None
    homes: Mapping[str, tuple[int, MediaPlace]] = field(default_factory=dict)

    def media_keys(self) -> list[MediumKey]:
        """Returns the key of every medium, repeated as often as it is shown."""
        records = [item for item in self.items if isinstance(item, Record)]
        keys = [self.place.key(medium) for record in records for medium in _media(record)]
        shown = [one for solved in (self.exemplars or {}).values() for one in solved]
        return [*keys, *(self.home(one)[1].key(medium) for one in shown for medium in _media(one))]

    def home(self, record: Record) -> tuple[int, MediaPlace]:
        """Returns the number of a record's source, and where its media lie."""
        return self.homes.get(record.source, (self.source, self.place))


@dataclass(frozen=True, slots=True)
class Built:
    """What became of a chunk.

    Attributes:
        batch: Rows of ``instructions_schema``.
        keys: ``(rows, 2)`` what ``SplitOverlap`` compares.
        probes: Media that were probed here.
        odd: Rows with invisible or direction-changing characters.
        asked: Rows by how they are asked: ``shots_2``, ``rationale``, ``options``, ``no_options``, ``inverted``, and
            those with exemplars by what parts these: ``parted_turns``, or the name of delimiters.
    """

    source: int
    split: str
    batch: pa.RecordBatch
    keys: np.ndarray
    rejects: tuple[Reject, ...]
    probes: Mapping[MediumKey, Probe]
    odd: int
    tasks: Counter[str]
    asked: Counter[str]


@dataclass(frozen=True, slots=True)
class Asked:
    """How the rows of one source are asked.

    Attributes:
        wordings: Its templates.
        verbalizer: Its labels in words, or None.
        content_free: Stands for a text without content, or empty; see ``build.content_free``.
        further: Templates whose wordings held-out rows with options keep too.
    """

    wordings: Wordings
    verbalizer: Verbalizer | None = None
    content_free: str = ""
    further: Kept = ()


@dataclass(frozen=True, slots=True)
class ChunkBuilder:
    """Builds chunks; every process has one.

    Attributes:
        seed: Chooses templates and styles.
        sources: How the rows of each source are asked, by its number.
        system: System turn before every conversation, or empty.
        limits: What a medium may be.
        shares: Styles of training rows, or None.
        choose: Finds the exemplars of training rows, or None.
        order: How exemplars stand.
        known_as: What a record is in features/ besides its media.
        prompt: A searched prompt that words every row, or None.
        keep_slots: Rows keep what a searched prompt may name.
        name: Medium of a finished row, or of the prompt's exemplars, to a name that equal media share.
        render: Renders templates in Jinja.
    """

    seed: int
    sources: tuple[Asked, ...]
    system: str
    limits: ProbeLimits
    shares: Shares | None = None
    choose: Choose | None = None
    order: Order = "nearest_first"
    known_as: Callable[[Record, MediaPlace], tuple[str, ...]] | None = None
    prompt: SearchedPrompt | None = None
    keep_slots: bool = False
    name: Callable[[Medium], str] = own_name
    render: JinjaProcess = field(default_factory=JinjaProcess)

    def __call__(self, work: tuple[Chunk, Mapping[MediumKey, Probe]]) -> Built:
        """Returns the rows of a chunk, given the probes that are known of its media."""
        chunk, known = work
        probers = _Probers(self.limits, known)
        rows, rejects, keys = [], [], []
        odd, tasks, asked = 0, Counter[str](), Counter[str]()
        for item in chunk.items:
            example = item if isinstance(item, Reject) else self._example(item, chunk, probers, asked)
            if isinstance(example, Reject):
                rejects.append(example)
                continue
            rows.append(example_to_row(example))
            assert isinstance(item, Record)
            keys.append(example_keys(example, item))
            tasks[example.task] += 1
            if example.exemplar_ids:
                asked[f"parted_{example.metadata.get(DELIMITERS, TURNS)}"] += 1
            odd += any(_ODD.search(message.text) is not None for message in example.messages)
        return Built(
            source=chunk.source,
            split=chunk.split,
            batch=pa.RecordBatch.from_pylist(rows, schema=instructions_schema()),
            keys=np.array(keys, np.uint64).reshape(-1, 2),
            rejects=tuple(rejects),
            probes=probers.fresh(),
            odd=odd,
            tasks=tasks,
            asked=asked,
        )

    def _example(self, record: Record, chunk: Chunk, probers: _Probers, asked: Counter[str]) -> Example | Reject:
        how = self.sources[chunk.source]
        probed = _probed(record, how, probers.of(record.source, chunk.place))
        if isinstance(probed, Reject):
            return probed
        style, number = Style(), 0
        if self.shares is not None and chunk.split == "train" and not record.messages:
            style, number = self.shares.draw(record.id, self.seed)
            style = _possible(probed, how.wordings, style)
        solved = [self._solved(one, chunk, probers) for one in self._exemplars(record, number, chunk)]
        made = make_example(
            probed,
            seed=self.seed,
            wordings=how.wordings,
            system=self.system,
            style=style,
            exemplars=[one for one in solved if isinstance(one, Record)],
            order=self.order,
            render=self.render,
        )
        if isinstance(made, Reject):
            return made
        if self.known_as is not None:
            made = replace(made, feature_ids=self.known_as(record, chunk.place))
        asked.update(_said_of(made, probed, how, style))
        if chunk.split != "train" and made.options and not probed.messages:
            made = self._with_kept(made, probed, how)
        if self.keep_slots and not probed.messages:
            made = replace(made, metadata={**made.metadata, SLOTS: slots_text(probed)})
        if self.prompt is not None and not style.inverted:
            made = asked_with(self.prompt, made, self.name)
        if isinstance(made, Reject) or self.shares is None or chunk.split != "train":
            return made
        return delimited(made, self.shares.delimiters, self.seed)

    def _exemplars(self, record: Record, number: int, chunk: Chunk) -> Sequence[Record]:
        if not number:
            return ()
        if chunk.exemplars is not None:
            return chunk.exemplars.get(record.id, ())[:number]
        return self.choose(record, number) if self.choose is not None else ()

    def _solved(self, exemplar: Record, chunk: Chunk, probers: _Probers) -> Record | Reject:
        number, place = chunk.home(exemplar)
        return _probed(exemplar, self.sources[number], probers.of(exemplar.source, place))

    def _with_kept(self, made: Example, record: Record, how: Asked) -> Example:
        """Returns an example that also keeps its further wordings, and what templates say of a text without content."""
        kept, empty = dict[str, str](), _without_content(record, how.content_free) if how.content_free else None
        if empty is not None:
            wordings = replace(how.wordings, name=made.template_id)
            asked = make_example(empty, seed=self.seed, wordings=wordings, system="", render=self.render)
            if isinstance(asked, Example):
                prompt = next((marked(message.parts) for message in asked.messages if message.role == "user"), "")
                kept["content_free"] = prompt.replace(MEDIA, "")
        if how.further:
            kept[WORDINGS] = wordings_text(
                record, made, how.further, seed=self.seed, wordings=how.wordings, render=self.render, empty=empty
            )
        return replace(made, metadata={**made.metadata, **kept}) if kept else made


def _without_content(record: Record, text: str) -> Record:
    """Returns a record that says a text in place of its own, and shows nothing."""
    fields = {key: text if isinstance(value, str) else value for key, value in record.fields.items()}
    own, context = text if record.text else "", text if record.context else ""
    return replace(record, text=own, context=context, media=(), fields=fields)


class _Probers:
    """Probers of the media of a chunk and of its exemplars, one for each source."""

    def __init__(self, limits: ProbeLimits, known: Mapping[MediumKey, Probe]) -> None:
        self._limits, self._known = limits, known
        self._of: dict[str, Prober] = {}

    def of(self, source: str, place: MediaPlace) -> Prober:
        """Returns the prober of a source."""
        if source not in self._of:
            self._of[source] = Prober(place, self._limits, self._known)
        return self._of[source]

    def fresh(self) -> dict[MediumKey, Probe]:
        """Returns what was probed here."""
        return {key: probe for prober in self._of.values() for key, probe in prober.fresh.items()}


def _probed(record: Record, how: Asked, prober: Prober) -> Record | Reject:
    """Returns a record with header facts of its media and its labels in words, or its refusal."""
    found: dict[Medium, Medium] = {}
    for medium in _media(record):
        probe = prober.probe(medium)
        if isinstance(probe, tuple):
            return Reject(record.where, record.id, *probe)
        found[medium] = probe
    if found:
        record = _with_media(record, found)
    return record if how.verbalizer is None else verbalized(record, how.verbalizer)


def _possible(record: Record, wordings: Wordings, style: Style) -> Style:
    """Returns a style without what the row or its templates cannot do."""
    return Style(
        options=style.options if record.options else None,
        inverted=style.inverted and wordings.name is None and has_inverted(record, wordings),
        rationale=style.rationale and bool(record.rationale),
    )


def _said_of(made: Example, record: Record, how: Asked, style: Style) -> list[str]:
    names = [f"shots_{len(made.exemplar_ids)}"]
    names += ["inverted"] if style.inverted else []
    names += ["rationale"] if style.rationale else []
    if record.options and not record.messages and not style.inverted:
        # What is counted is what the template does, whatever was drawn.
        listed = template_names(how.wordings.file)[made.template_id].shows_options
        names.append("options" if listed else "no_options")
    return names


def _media(record: Record) -> tuple[Medium, ...]:
    return record.media or tuple(medium for message in record.messages for medium in message.media)


def _with_media(record: Record, found: Mapping[Medium, Medium]) -> Record:
    """Returns a record whose media are replaced, by what their headers told."""
    messages = tuple(
        replace(message, parts=tuple(found[part] if isinstance(part, Medium) else part for part in message.parts))
        for message in record.messages
    )
    return replace(record, media=tuple(found[medium] for medium in record.media), messages=messages)
