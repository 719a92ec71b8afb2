"""Which rows a report shows, with their media as data URIs."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmtune.records import Medium, items_of
from mmtune.reports.shown_media import SOUND_SECONDS, frames, picture, sound

KINDS = ("won", "lost", "missed", "right", "wrong")
"""What may be said of a shown row: of two answerers the second did better or worse, or both were wrong; of one that it
was right or wrong."""
_PICTURES, _SOUNDS = 4, 2
"""Most of a row."""
_ITEMS = 10


@dataclass(frozen=True, slots=True)
class Answer:
    """One model's answer to a shown row."""

    model: str
    text: str
    score: float


@dataclass(frozen=True, slots=True)
class Sample:
    """A row as the page shows it.

    Attributes:
        question: In the row's own words.
        searched: The question in the words of a searched prompt, empty where that says the same or asks nothing.
        pictures: Data URIs of images, and of frames of videos.
        sounds: Data URIs.
        other_media: File names of what is no image, and the newest items of histories.
        references: Each distinct reference with how often it was given.
    """

    id: str
    kind: str
    metric: str
    question: str
    searched: str
    pictures: tuple[str, ...]
    sounds: tuple[str, ...]
    other_media: tuple[str, ...]
    references: tuple[tuple[str, int], ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Shown:
    """What choosing needs of a row.

    Attributes:
        group: Equal for rows that show the same media.
        metric: The leading metric, empty when the row has none.
        scores: One per model; None where it was not scored.
        compared: Places of the models that tell its kind: one, or the two of which the second is judged by the first.
    """

    id: str
    group: str
    metric: str
    scores: tuple[float | None, ...]
    higher_is_better: bool
    references: tuple[str, ...]
    compared: tuple[int, ...] = (0, 1)


def choose_rows(rows: Sequence[Shown], *, each: int = 12, seed: int = 0) -> dict[str, list[int]]:
    """Returns row numbers per kind, chosen by a hash of the id and not by how good they look.

    Args:
        rows: All rows; one per group is taken as long as there are others.
        each: At most this many rows of a kind.
        seed: Another seed shows other rows.
    """
    found: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        kind = _kind([row.scores[at] for at in row.compared], row.higher_is_better)
        if kind:
            found.setdefault(kind, []).append(number)
    chosen = {}
    for kind in (kind for kind in KINDS if kind in found):
        ordered = sorted(found[kind], key=lambda at: hashlib.sha256(f"{seed}/{rows[at].id}".encode()).digest())
        seen: set[str] = set()
        first: list[int] = []
        later: list[int] = []
        for at in ordered:
            (later if rows[at].group in seen else first).append(at)
            seen.add(rows[at].group)
        chosen[kind] = (first + later)[:each]
    return chosen


def make_sample(
    row: Shown, kind: str, asked: tuple[str, str], media: Sequence[Medium], answers: Mapping[str, str], root: Path
) -> Sample:
    """Returns a row as the page shows it, with at most four pictures and two sounds.

    Args:
        row: The row.
        kind: One of ``KINDS``.
        asked: Its question, and that in the words of a searched prompt.
        media: What it shows.
        answers: By model.
        root: Of the media.
    """
    question, searched = asked
    histories = sum(medium.modality == "behaviour" for medium in media)
    names = iter([f"history {at + 1}" for at in range(histories)] if histories > 1 else ["history"])
    sounds = [medium for medium in media if medium.modality == "audio"][:_SOUNDS]
    return Sample(
        id=row.id,
        kind=kind,
        metric=row.metric,
        question=question,
        searched=searched if searched != question else "",
        pictures=_pictures(media, root),
        sounds=tuple(uri for medium in sounds if (uri := sound(root, medium))),
        other_media=tuple(_in_words(medium, names) for medium in media if medium.modality != "image"),
        references=counted(row.references),
        answers=tuple(
            Answer(model, text, score or 0.0) for (model, text), score in zip(answers.items(), row.scores, strict=True)
        ),
    )


def _pictures(media: Sequence[Medium], root: Path) -> tuple[str, ...]:
    """Returns images, and frames of videos: each video has its share of the places that are left."""
    seen = [medium for medium in media if medium.modality in ("image", "video")][:_PICTURES]
    images = sum(medium.modality == "image" for medium in seen)
    each = (_PICTURES - images) // max(len(seen) - images, 1)
    found: list[str] = []
    for medium in seen:
        found += frames(root, medium, each) if medium.modality == "video" else [picture(root, medium)]
    return tuple(uri for uri in found if uri)


def _in_words(medium: Medium, names: Iterator[str]) -> str:
    if medium.modality == "audio" and medium.seconds > SOUND_SECONDS:
        return f"{Path(medium.path).name}, the first {SOUND_SECONDS} of {medium.seconds:.0f} seconds"
    if medium.modality != "behaviour":
        return Path(medium.path).name
    items = items_of(medium)
    older = ["..."] if len(items) > _ITEMS else []
    return f"{next(names)}: {', '.join([*older, *items[-_ITEMS:]]) or 'nothing yet'}"


def _kind(values: Sequence[float | None], higher_is_better: bool) -> str:
    known = [value if higher_is_better else -value for value in values if value is not None]
    if not known or len(known) < len(values):
        return ""
    # Half right or more counts as right where only one model is shown.
    good = 50.0 if higher_is_better else -50.0
    if len(known) == 1:
        return "right" if known[0] >= good else "wrong"
    if known[1] != known[0]:
        return "won" if known[1] > known[0] else "lost"
    return "missed" if known[1] < good else ""


def counted(references: Sequence[str], most: int = 8) -> tuple[tuple[str, int], ...]:
    """Returns the distinct references with their counts, the most frequent first."""
    return tuple(Counter(references).most_common(most))
