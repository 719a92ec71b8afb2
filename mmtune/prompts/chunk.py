"""A chunk of what a reader found to finished rows: media probed, a template applied, or a refusal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from mmtune.media.known import MediaPlace, MediumKey, Probe, Prober
from mmtune.media.probe import ProbeLimits
from mmtune.prompts.overlap import example_keys
from mmtune.prompts.schema import example_to_row, instructions_schema
from mmtune.prompts.template import make_example
from mmtune.records import Example, Medium, Record, Reject

_ODD = re.compile("[\0\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A few items of one source.

    Attributes:
        source: Number of the source.
        template: The one template to use, or None to choose by row.
        place: Where its media lie.
        items: Records, and what the reader refused.
    """

    source: int
    split: str
    template: str | None
    place: MediaPlace
    items: tuple[Record | Reject, ...]

    def media_keys(self) -> list[MediumKey]:
        """Returns the key of every medium, repeated as often as it is shown."""
        records = (item for item in self.items if isinstance(item, Record))
        return [self.place.key(medium) for record in records for medium in _media(record)]


@dataclass(frozen=True, slots=True)
class Built:
    """What became of a chunk.

    Attributes:
        batch: Rows of ``instructions_schema``.
        keys: ``(rows, 2)`` what ``SplitOverlap`` compares.
        probes: Media that were probed here.
        odd: Rows with invisible or direction-changing characters.
    """

    source: int
    split: str
    batch: pa.RecordBatch
    keys: np.ndarray
    rejects: tuple[Reject, ...]
    probes: Mapping[MediumKey, Probe]
    odd: int
    tasks: Counter[str]


@dataclass(frozen=True, slots=True)
class ChunkBuilder:
    """Builds chunks; every process has one.

    Attributes:
        seed: Chooses templates.
        templates: ``auto``, or the templates of each task.
        system: System turn before every conversation, or empty.
        limits: What a medium may be.
    """

    seed: int
    templates: Any
    system: str
    limits: ProbeLimits

    def __call__(self, work: tuple[Chunk, Mapping[MediumKey, Probe]]) -> Built:
        """Returns the rows of a chunk, given the probes that are known of its media."""
        chunk, known = work
        prober = Prober(chunk.place, self.limits, known)
        rows, rejects, keys = [], [], []
        odd, tasks = 0, Counter[str]()
        for item in chunk.items:
            example = item if isinstance(item, Reject) else self._example(item, chunk.template, prober)
            if isinstance(example, Reject):
                rejects.append(example)
                continue
            rows.append(example_to_row(example))
            keys.append(example_keys(example))
            tasks[example.task] += 1
            odd += any(_ODD.search(message.text) is not None for message in example.messages)
        return Built(
            source=chunk.source,
            split=chunk.split,
            batch=pa.RecordBatch.from_pylist(rows, schema=instructions_schema()),
            keys=np.array(keys, np.uint64).reshape(-1, 2),
            rejects=tuple(rejects),
            probes=prober.fresh,
            odd=odd,
            tasks=tasks,
        )

    def _example(self, record: Record, template: str | None, prober: Prober) -> Example | Reject:
        found: dict[Medium, Medium] = {}
        for medium in _media(record):
            probe = prober.probe(medium)
            if isinstance(probe, tuple):
                return Reject(record.where, record.id, *probe)
            found[medium] = probe
        if found:
            record = _with_media(record, found)
        return make_example(record, seed=self.seed, templates=self.templates, template=template, system=self.system)


def _media(record: Record) -> tuple[Medium, ...]:
    return record.media or tuple(medium for message in record.messages for medium in message.media)


def _with_media(record: Record, found: Mapping[Medium, Medium]) -> Record:
    """Returns a record whose media are replaced, by what their headers told."""
    messages = tuple(
        replace(message, parts=tuple(found[part] if isinstance(part, Medium) else part for part in message.parts))
        for message in record.messages
    )
    return replace(record, media=tuple(found[medium] for medium in record.media), messages=messages)
