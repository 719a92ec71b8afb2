"""Rows that show the same media to token trees, many groups at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from mmtune.encoding.refused import Refused
from mmtune.encoding.render import EncodedRow
from mmtune.encoding.tree import TREE_SCHEMA, build_trees, tree_to_row
from mmtune.records import Reject


@dataclass(frozen=True, slots=True)
class EncodedGroups:
    """What came of some groups.

    Attributes:
        batch: Rows of ``TREE_SCHEMA``, or None without any.
        rejects: The rows that were refused.
        rows: Rows that were encoded.
        tokens: Tokens of the trees.
        apart: Tokens of the same rows without sharing.
        notes: What a person should know, each said once.
        counts: What was left out of the rows: ``exemplars_dropped`` that did not fit, of ``rows_with_fewer``;
            ``contexts_shortened``, that lost their end; and those of ``histories.history_counts``.
    """

    batch: pa.RecordBatch | None
    rejects: list[Reject]
    rows: int
    tokens: int
    apart: int
    notes: tuple[str, ...]
    counts: Mapping[str, int] = field(default_factory=dict)


def group_order(groups: Iterable[str], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns row numbers ordered by group (groups by first appearance), and where each group starts.

    Args:
        groups: The group of every row, read once; eight bytes of each are kept.
        count: Number of rows.
    """
    digests = (hashlib.blake2b(group.encode(), digest_size=8).digest() for group in groups)
    keys = np.frombuffer(b"".join(digests), dtype=np.int64, count=count)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first[inverse], kind="stable")
    ranks = first[inverse][order]
    starts = np.flatnonzero(np.r_[True, ranks[1:] != ranks[:-1]]) if count else np.empty(0, dtype=np.int64)
    return order, np.r_[starts, count]


def encode_groups(
    rows: Sequence[Mapping[str, Any]],
    starts: Iterable[int],
    encode: Callable[[Mapping[str, Any]], EncodedRow],
    max_length: int,
    notes: Iterable[str] = (),
) -> EncodedGroups:
    """Returns the trees of some groups, in order.

    Args:
        rows: Rows with an ``id``, group after group.
        starts: Where each group starts in ``rows``, and the end of the last.
        encode: A row to its encoding; raises Refused.
        max_length: Most tokens of a tree.
        notes: Read after the work.
    """
    trees: list[dict[str, Any]] = []
    rejects: list[Reject] = []
    done = tokens = apart = 0
    for first, last in pairwise(starts):
        encoded, ids = [], []
        for row in rows[first:last]:
            try:
                found = encode(row)
            except Refused as refused:
                rejects.append(Reject("", row["id"], refused.reason, refused.detail))
                continue
            encoded.append(found)
            ids.append(row["id"])
            apart += found.input_ids.size
        done += len(encoded)
        for tree in build_trees(encoded, ids, max_length) if encoded else ():
            trees.append(tree_to_row(tree))
            tokens += tree.input_ids.size
    batch = pa.RecordBatch.from_pylist(trees, schema=TREE_SCHEMA) if trees else None
    return EncodedGroups(batch, rejects, done, tokens, apart, tuple(notes))
