"""Which rows a report shows, and their pictures as data URIs."""

from __future__ import annotations

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmtune.errors import DataError
from mmtune.media.load import load_image
from mmtune.records import Medium

KINDS = {
    "won": "Better after tuning",
    "lost": "Worse after tuning",
    "missed": "Wrong before and after",
    "right": "Right",
    "wrong": "Wrong",
}
_SIDE_PX = 240
_SMALL_PX = 128


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
        pictures: Data URIs.
        other_media: File names of what cannot be shown.
        references: Each distinct reference with how often it was given.
    """

    id: str
    kind: str
    metric: str
    question: str
    pictures: tuple[str, ...]
    other_media: tuple[str, ...]
    references: tuple[tuple[str, int], ...]
    answers: tuple[Answer, ...]


def choose_rows(
    ids: Sequence[str],
    groups: Sequence[str],
    scores: Sequence[Sequence[float | None]],
    *,
    higher_is_better: Sequence[bool],
    each: int = 12,
    seed: int = 0,
) -> dict[str, list[int]]:
    """Returns row numbers per kind, chosen by a hash of the id and not by how good they look.

    Args:
        ids: Of all rows.
        groups: What each row shows; one row per group is taken as long as there are others.
        scores: Per row one score per model, base before tuned; None when it was not scored.
        higher_is_better: Per row.
        each: At most this many rows of a kind.
        seed: Another seed shows other rows.
    """
    found: dict[str, list[int]] = {}
    for row, values in enumerate(scores):
        kind = _kind(values, higher_is_better[row])
        if kind:
            found.setdefault(kind, []).append(row)
    chosen = {}
    for kind in KINDS:
        ordered = sorted(found.get(kind, ()), key=lambda row: hashlib.sha256(f"{seed}/{ids[row]}".encode()).digest())
        seen: set[str] = set()
        first, later = [], []
        for row in ordered:
            (later if groups[row] in seen else first).append(row)
            seen.add(groups[row])
        if ordered:
            chosen[kind] = (first + later)[:each]
    return chosen


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


def picture(root: Path, medium: Medium) -> str:
    """Returns an image as a small data URI, or an empty string when it cannot be read."""
    from PIL import Image

    try:
        image = load_image(root, medium)
    except DataError:
        return ""
    small = max(image.size) <= _SMALL_PX
    if not small:
        image.thumbnail((_SIDE_PX, _SIDE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Tiny pictures stay exact; photographs become JPEGs of a few kilobytes.
    image.save(buffer, "PNG" if small else "JPEG", **({"optimize": True} if small else {"quality": 78}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def counted(references: Sequence[str], most: int = 8) -> tuple[tuple[str, int], ...]:
    """Returns the distinct references with their counts, the most frequent first."""
    return tuple(Counter(references).most_common(most))
