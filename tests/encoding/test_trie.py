"""Tries hold every row and nothing else, and a token sees its own path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmtune.encoding.render import EncodedRow, MediaSpan
from mmtune.encoding.trie import build_tries
from mmtune.records import Medium


def row(ids: list[int], labels: int, *media: MediaSpan) -> EncodedRow:
    """The last ``labels`` tokens bear loss."""
    array = np.array(ids, dtype=np.int32)
    return EncodedRow(array, np.where(np.arange(array.size) >= array.size - labels, array, -100), media)


def always(*sizes: int) -> bool:
    return True


def span(name: str, start: int, length: int) -> MediaSpan:
    return MediaSpan(Medium("image", name, width=4, height=4), start, length)


words = st.lists(st.integers(0, 2), min_size=2, max_size=9)
many = st.lists(words.flatmap(lambda ids: st.tuples(st.just(ids), st.integers(1, len(ids)))), min_size=1, max_size=12)


@given(many, st.booleans(), st.integers(3, 40))
def test_paths_are_the_rows(found: list[tuple[list[int], int]], whole: bool, limit: int):
    rows = [row(ids, labels) for ids, labels in found]
    tries = build_tries(rows, lambda total, own, shared: total + own - shared <= limit, whole_prompts=whole)
    told: dict[int, list[tuple[int, int]]] = {}
    for trie in tries:
        assert trie.rows.size == 1 or trie.input_ids.size <= limit
        for number, (path, _) in zip(trie.rows, trie.paths(), strict=True):
            length = path.size
            assert trie.input_ids[path].tolist() == rows[number].input_ids[:length].tolist()
            assert trie.places[path].tolist() == list(range(length))
            first = max(len(found[number][0]) - found[number][1], 1)
            assert trie.prompt[path].tolist() == [place < first for place in range(length)] or not whole
            # Whoever sees whom, by the paths themselves.
            for place, at in enumerate(path):
                seen = {k for k in range(trie.input_ids.size) if k <= at < trie.ends[k]}
                assert seen == set(path[: place + 1].tolist())
            own = trie.owners == number
            told[int(number)] = [
                (int(np.flatnonzero(path == ask)[0]), int(target))
                for ask, target in zip(trie.asks[own], trie.targets[own], strict=True)
            ]
    for number, (ids, labels) in enumerate(found):
        first = max(len(ids) - labels, 1)
        assert told.get(number, []) == [(place - 1, ids[place]) for place in range(first, len(ids))]


@given(many)
def test_no_beginning_stands_twice(found: list[tuple[list[int], int]]):
    rows = [row(ids, labels) for ids, labels in found]
    (trie,) = build_tries(rows, always)
    beginnings = {tuple(ids[:size]) for ids, _ in found for size in range(1, len(ids))}
    assert trie.input_ids.size == len(beginnings)


def test_a_medium_is_shared_with_the_same_file_in_the_same_place_alone():
    a, b = [7, 5, 5, 1, 2], [7, 5, 5, 1, 3]
    (trie,) = build_tries([row(a, 2, span("x", 1, 2)), row(b, 2, span("x", 1, 2))], always)
    assert trie.input_ids.tolist() == [7, 5, 5, 1] and len(trie.media) == 1
    (trie,) = build_tries([row(a, 2, span("x", 1, 2)), row(b, 2, span("y", 1, 2))], always)
    assert trie.input_ids.tolist() == [7, 5, 5, 1, 5, 5, 1] and [one.start for one in trie.media] == [1, 4]
    # A medium is never cut, even where the tokens at its start agree.
    (trie,) = build_tries([row(a, 2, span("x", 1, 2)), row([7, 5, 5, 5, 3], 1, span("x", 1, 3))], always)
    assert trie.shared.tolist() == [0, 1] and [one.length for one in trie.media] == [2, 3]


def test_whole_prompts_share_nothing_but_whole_prompts():
    rows = [row([1, 2, 3, 8, 9], 2), row([1, 2, 3, 8, 7], 2), row([1, 2, 4, 8, 9], 2), row([1, 2, 3, 8, 9], 1)]
    (trie,) = build_tries(rows, always, whole_prompts=True)
    assert dict(zip(trie.rows.tolist(), trie.shared.tolist(), strict=True)) == {0: 0, 1: 4, 3: 0, 2: 0} or (
        sorted(trie.shared.tolist()) == [0, 0, 0, 4]
    )


def test_rows_without_labels_are_left_out():
    assert build_tries([row([1, 2, 3], 0)], always) == []
    (trie,) = build_tries([row([1, 2, 3], 0), row([1, 2], 1)], always)
    assert trie.rows.tolist() == [1] and trie.input_ids.tolist() == [1]


def test_the_real_renderer_gives_rows_that_share(tiny_vlm: Path) -> None:
    from mmtune.encoding.processor import load_processor
    from mmtune.encoding.render import Renderer
    from mmtune.records import Message, TextPart

    encode: Any = Renderer(load_processor(str(tiny_vlm))).encode
    rows = [
        encode([Message("user", (TextPart(q),)), Message("assistant", (TextPart(a),))])
        for q in ("What is it?", "What is that?")
        for a in ("red", "green", "blue")
    ]
    (trie,) = build_tries(rows, always)
    assert trie.rows.size == 6 and trie.input_ids.size < 0.5 * sum(one.input_ids.size for one in rows)
