"""Trees: the rows come back exactly, whatever is shared, and what is shared saves tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.encoding.render import EncodedRow, MediaSpan
from mmtune.encoding.tree import TREE_SCHEMA, Tree, build_trees, row_to_tree, shared_length, tree_rows, tree_to_row
from mmtune.records import Medium, Message, TextPart


@st.composite
def groups(draw: Any) -> list[EncodedRow]:
    """Rows with a common start, and with media in it and after it."""
    common = draw(st.lists(st.integers(1, 4), max_size=6))
    media = draw(st.booleans())
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        question = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
        answer = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        own = draw(st.booleans())
        spans = []
        ids = list(common)
        if media:
            spans.append(MediaSpan(Medium("image", "shared.png", width=8, height=8), len(ids), 3))
            ids += [9, 9, 9]
        ids += question
        if own:
            path = draw(st.sampled_from(["a.png", "b.png"]))
            spans.append(MediaSpan(Medium("image", path, width=8, height=8), len(ids), 2))
            ids += [9, 9]
        labels = [-100] * len(ids) + answer
        ids += answer
        rows.append(EncodedRow(np.array(ids, np.int32), np.array(labels, np.int32), tuple(spans)))
    return rows


def equal(one: EncodedRow, other: EncodedRow) -> bool:
    return (
        np.array_equal(one.input_ids, other.input_ids)
        and np.array_equal(one.labels, other.labels)
        and one.media == other.media
    )


@settings(max_examples=300, deadline=None)
@given(rows=groups(), longest=st.integers(20, 60))
def test_rows_come_back_exactly(rows: list[EncodedRow], longest: int) -> None:
    names = [f"row{number}" for number in range(len(rows))]
    trees = list(build_trees(rows, names, longest))
    table = pa.RecordBatch.from_pylist([tree_to_row(tree) for tree in trees], schema=TREE_SCHEMA)
    trees = [row_to_tree(row) for row in table.to_pylist()]
    back = [row for tree in trees for row in tree_rows(tree)]
    assert [name for tree in trees for name in tree.example_ids] == names
    assert all(equal(one, other) for one, other in zip(back, rows, strict=True))
    for tree in trees:
        check(tree, longest)


def check(tree: Tree, longest: int) -> None:
    assert tree.input_ids.size <= max(longest, max(row.input_ids.size for row in tree_rows(tree)))
    assert (np.diff(tree.branch) >= 0).all()
    assert set(tree.branch.tolist()) - {0} == set(range(1, len(tree.example_ids) + 1))
    assert (tree.labels[tree.branch == 0] == -100).all()
    for number in range(1, len(tree.example_ids) + 1):
        # The last shared token has one successor per branch, so it must not be asked for one.
        assert tree.labels[tree.branch == number][0] == -100
    for span in tree.media:
        assert len(set(tree.branch[span.start : span.start + span.length].tolist())) == 1


def test_questions_about_one_image_share_it(family_of: Any, media: Any) -> None:
    family = family_of("qwen2_vl")
    medium, _ = media.image(200, 150)
    rows = [
        family.renderer.encode(
            [Message("user", (medium, TextPart(question))), Message("assistant", (TextPart("yes"),))]
        )
        for question in ("Is it red?", "Is it blue?", "How many?")
    ]
    (tree,) = build_trees(rows, ["a", "b", "c"], 500)
    (span,) = tree.media
    assert (tree.branch[: span.start + span.length] == 0).all()
    assert tree.input_ids.size < 1.6 * rows[0].input_ids.size
    assert all(equal(one, other) for one, other in zip(tree_rows(tree), rows, strict=True))


def test_another_image_is_not_shared() -> None:
    ids, labels = np.array([1, 9, 9, 2, 3], np.int32), np.array([-100] * 4 + [3], np.int32)
    rows = [
        EncodedRow(ids, labels, (MediaSpan(Medium("image", path, width=4, height=4), 1, 2),))
        for path in ("a.png", "b.png")
    ]
    assert shared_length(rows) == 1
