"""Token trees: one shared prefix and one branch per question, and back to separate rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from mmtune.encoding.render import IGNORED, EncodedRow, MediaSpan
from mmtune.records import Medium

_MEDIUM = pa.struct(
    [
        ("modality", pa.string()),
        ("path", pa.string()),
        ("bytes", pa.binary()),
        ("start", pa.int32()),
        ("length", pa.int32()),
        ("grid", pa.list_(pa.int32())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("frames", pa.int32()),
        ("fps", pa.float32()),
        ("sample_rate_hz", pa.int32()),
        ("seconds", pa.float32()),
    ]
)
TREE_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("branch", pa.list_(pa.int32())),
        ("media", pa.list_(_MEDIUM)),
        ("example_ids", pa.list_(pa.string())),
        ("weights", pa.list_(pa.float32())),
        ("length", pa.int32()),
    ]
)
"""One row of tokens/. ``grid`` of a video's frame is ``[frame, frames]``, else empty."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A shared prefix and its branches, laid out one after the other.

    Attributes:
        input_ids: ``(T,)`` prefix, then branch 1, 2, ...
        labels: ``(T,)``; the prefix bears no loss.
        branch: ``(T,)`` 0 for the prefix, k for the k-th branch.
        media: Spans by position in ``input_ids``.
        example_ids: One per branch.
        weights: One per branch.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    branch: np.ndarray
    media: tuple[MediaSpan, ...]
    example_ids: tuple[str, ...]
    weights: tuple[float, ...]

    def paths(self) -> Iterator[tuple[np.ndarray, int]]:
        """Yields where each branch's path stands, in order, and how many tokens it shares with the one before."""
        bounds = np.searchsorted(self.branch, np.arange(len(self.example_ids) + 2))
        prefix = np.arange(bounds[1])
        for number, (start, end) in enumerate(pairwise(bounds[1:])):
            yield np.concatenate([prefix, np.arange(start, end)]), prefix.size if number else 0


def shared_length(rows: Sequence[EncodedRow]) -> int:
    """Returns how many leading tokens all rows share: no loss in them, and no medium cut.

    The ids of every row are literally equal there, so sharing never changes an id.
    """
    if len(rows) < 2:
        return 0
    first = rows[0]
    length = min(row.input_ids.size for row in rows)
    for row in rows:
        same = first.input_ids[:length] == row.input_ids[:length]
        length = length if same.all() else int(np.argmin(same))
        bears = row.labels[:length] != IGNORED
        length = int(np.argmax(bears)) if bears.any() else length
    if any(length < row.labels.size and row.labels[length] != IGNORED for row in rows):
        # The token that predicts a branch's first label must stand in the branch itself.
        length = max(length - 1, 0)
    length = length if all(length < row.input_ids.size for row in rows) else max(length - 1, 0)
    for row in rows:
        for index, span in enumerate(row.media):
            inside = index < len(first.media) and first.media[index] == span
            if span.start < length and (not inside or span.start + span.length > length):
                length = span.start
    return length


def build_trees(rows: Sequence[EncodedRow], example_ids: Sequence[str], max_length: int) -> Iterator[Tree]:
    """Yields the trees of one group: as few as fit ``max_length`` tokens each, in order."""
    shared = shared_length(rows)
    start = 0
    while start < len(rows):
        end, total = start, shared
        while end < len(rows) and (end == start or total + rows[end].input_ids.size - shared <= max_length):
            total += rows[end].input_ids.size - shared
            end += 1
        prefix = shared if end - start > 1 else 0
        yield _tree(rows[start:end], example_ids[start:end], prefix)
        start = end


def _tree(rows: Sequence[EncodedRow], example_ids: Sequence[str], prefix: int) -> Tree:
    ids = [rows[0].input_ids[:prefix], *(row.input_ids[prefix:] for row in rows)]
    labels = [rows[0].labels[:prefix], *(row.labels[prefix:] for row in rows)]
    branch = np.repeat(np.arange(len(ids), dtype=np.int32), [part.size for part in ids])
    media = [span for span in rows[0].media if span.start < prefix]
    at = prefix
    for row in rows:
        moved = at - prefix
        media += [replace(span, start=span.start + moved) for span in row.media if span.start >= prefix]
        at += row.input_ids.size - prefix
    return Tree(
        np.concatenate(ids), np.concatenate(labels), branch, tuple(media), tuple(example_ids), (1.0,) * len(rows)
    )


def tree_rows(tree: Tree) -> list[EncodedRow]:
    """Returns the separate rows of a tree, one per branch."""
    bounds = np.searchsorted(tree.branch, np.arange(len(tree.example_ids) + 2))
    prefix = int(bounds[1])
    shared = tuple(span for span in tree.media if span.start < prefix)
    rows = []
    for start, end in pairwise(bounds[1:]):
        own = tuple(replace(s, start=s.start - int(start) + prefix) for s in tree.media if start <= s.start < end)
        rows.append(
            EncodedRow(
                np.concatenate([tree.input_ids[:prefix], tree.input_ids[start:end]]),
                np.concatenate([tree.labels[:prefix], tree.labels[start:end]]),
                shared + own,
            )
        )
    return rows


def some_branches(tree: Tree, kept: Sequence[int]) -> Tree:
    """Returns the tree of some branches alone, numbered from 0 here; one alone stands as a plain row."""
    if len(kept) == len(tree.example_ids):
        return tree
    rows = tree_rows(tree)
    prefix = int((tree.branch == 0).sum()) if len(kept) > 1 else 0
    small = _tree([rows[k] for k in kept], [tree.example_ids[k] for k in kept], prefix)
    return replace(small, weights=tuple(tree.weights[k] for k in kept))


def tree_to_row(tree: Tree) -> dict[str, Any]:
    """Returns a tree as a row of ``TREE_SCHEMA``."""
    return {
        "input_ids": tree.input_ids,
        "labels": tree.labels,
        "branch": tree.branch,
        "media": [_span_to_row(span) for span in tree.media],
        "example_ids": list(tree.example_ids),
        "weights": list(tree.weights),
        "length": int(tree.input_ids.size),
    }


def _span_to_row(span: MediaSpan) -> dict[str, Any]:
    medium = span.medium
    return {
        "modality": medium.modality,
        "path": medium.path,
        "bytes": medium.data,
        "start": span.start,
        "length": span.length,
        "grid": [span.frame, span.frames] if span.frames else [],
        "width": medium.width,
        "height": medium.height,
        "frames": medium.frames,
        "fps": medium.fps,
        "sample_rate_hz": medium.sample_rate_hz,
        "seconds": medium.seconds,
    }


def row_to_tree(row: Mapping[str, Any]) -> Tree:
    """Returns the tree in a row of ``TREE_SCHEMA``."""
    return Tree(
        np.asarray(row["input_ids"], dtype=np.int32),
        np.asarray(row["labels"], dtype=np.int32),
        np.asarray(row["branch"], dtype=np.int32),
        tuple(row_to_span(item) for item in row["media"]),
        tuple(row["example_ids"]),
        tuple(row["weights"]),
    )


def row_to_span(item: Mapping[str, Any]) -> MediaSpan:
    """Returns the medium in a cell of ``media``."""
    medium = Medium(
        modality=item["modality"],
        path=item["path"],
        data=item["bytes"],
        width=item["width"],
        height=item["height"],
        frames=item["frames"],
        fps=item["fps"],
        sample_rate_hz=item["sample_rate_hz"],
        seconds=item["seconds"],
    )
    frame, frames = item["grid"] if item["grid"] else (0, 0)
    return MediaSpan(medium, item["start"], item["length"], frame, frames)
