"""Packing: nothing lost, every budget kept, the same bins each time, close to the fewest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.training.packing import Packing, TreeLengths, pack, tree_costs, tree_lengths

SIZES = st.lists(st.integers(1, 100), min_size=1, max_size=60)


def fewest(costs: list[int], capacity: int) -> int:
    """The exact least number of bins, by trying every bin for every item."""
    best = len(costs)

    def place(index: int, rooms: list[int]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if index == len(costs):
            best = len(rooms)
            return
        for room in sorted({room for room in rooms if room >= costs[index]}):
            at = rooms.index(room)
            place(index + 1, [*rooms[:at], room - costs[index], *rooms[at + 1 :]])
        place(index + 1, [*rooms, capacity - costs[index]])

    place(0, [])
    return best


@settings(max_examples=200, deadline=None)
@given(costs=SIZES, capacity=st.integers(60, 250))
def test_nothing_lost_and_capacity_kept(costs: list[int], capacity: int) -> None:
    bins = pack(np.array(costs), capacity)
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(costs)))
    for members in bins:
        assert sum(costs[index] for index in members) <= capacity or len(members) == 1
    assert [members.tolist() for members in bins] == [m.tolist() for m in pack(np.array(costs), capacity)]


@settings(max_examples=60, deadline=None)
@given(costs=st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_near_the_fewest_bins(costs: list[int]) -> None:
    # The bound of best-fit decreasing: 11/9 of the optimum, and 6/9 of a bin (Dosa, 2007).
    assert len(pack(np.array(costs), 20)) <= 11 / 9 * fewest(costs, 20) + 6 / 9


def test_a_real_spread_fills_its_bins() -> None:
    costs = np.random.default_rng(0).gamma(4.0, 80.0, 20_000).astype(int).clip(20, 2048)
    assert len(pack(costs, 2048)) <= np.ceil(costs.sum() / 2048) * 1.005 + 1


@settings(max_examples=100, deadline=None)
@given(data=st.data(), n=st.integers(1, 40), media=st.integers(20, 200), rows=st.integers(2, 12))
def test_every_budget_is_kept(data: Any, n: int, media: int, rows: int) -> None:
    def draw(most: int) -> np.ndarray:
        return np.array(data.draw(st.lists(st.integers(1, most), min_size=n, max_size=n)))

    lengths = TreeLengths(draw(100), draw(60), draw(6))
    for members in pack(tree_costs(lengths, 100, media=media, rows=rows), 100):
        if len(members) > 1:
            assert lengths.tokens[members].sum() <= 100
            assert lengths.media[members].sum() <= media
            assert lengths.rows[members].sum() <= rows


@settings(max_examples=100, deadline=None)
@given(
    tokens=SIZES,
    capacity=st.integers(100, 250),
    media=st.none() | st.integers(10, 300),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
)
def test_batches_hold_whole_bins_and_keep_every_budget(
    tokens: list[int], capacity: int, media: int | None, seed: int, epoch: int
) -> None:
    sizes = np.array(tokens)
    rows, shown = sizes % 5 + 1, sizes * (sizes % 3) // 3
    lengths = TreeLengths(sizes, shown, rows)
    packing = Packing(tree_costs(lengths, capacity, media=media, rows=12), lengths, capacity, seed)
    bins = packing.bins(epoch)
    batches = packing.epoch_batches(epoch, batch_tokens=3 * capacity, batch_rows=12, batch_media_tokens=media)
    found = [members.tolist() for batch in batches for members in packing.split(batch)]
    assert sorted(found) == sorted(members.tolist() for members in bins)
    for batch in batches:
        assert len(packing.split(batch)) <= 3
        assert rows[batch].sum() <= 12 or len(batch) == 1
        assert media is None or shown[batch].sum() <= media or len(batch) == 1


def test_epochs_differ_and_repeat() -> None:
    costs = np.random.default_rng(1).integers(50, 60, 200)
    packing = Packing(costs, TreeLengths(costs, costs * 0, np.ones_like(costs)), 512, seed=3)
    first, second = (packing.epoch_batches(epoch, batch_tokens=1024) for epoch in (0, 1))
    assert [b.tolist() for b in first] == [b.tolist() for b in packing.epoch_batches(0, batch_tokens=1024)]
    assert {frozenset(b.tolist()) for b in first} != {frozenset(b.tolist()) for b in second}


def test_lengths_of_a_table_in_slices(tree_table: pa.Table) -> None:
    for table in (tree_table, tree_table.slice(1)):
        found = tree_lengths(table)
        rows = table.to_pylist()
        assert found.tokens.tolist() == [len(row["input_ids"]) for row in rows]
        assert found.media.tolist() == [sum(span["length"] for span in row["media"]) for row in rows]
        assert found.rows.tolist() == [len(row["example_ids"]) for row in rows]


@given(
    costs=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    capacity=st.integers(40, 90),
    tokens=st.integers(20, 200),
    smaller=st.integers(5, 200),
    rows=st.none() | st.integers(1, 9),
)
def test_a_micro_batch_is_cut_in_its_order(
    costs: list[int], capacity: int, tokens: int, smaller: int, rows: int | None
) -> None:
    """No tree is lost or moved, a part keeps the limits or is one tree, and its bins are found again in it."""
    lengths = TreeLengths(np.array(costs), np.zeros(len(costs), np.int64), np.array(costs) % 3 + 1)
    packing = Packing(lengths.tokens, lengths, capacity, seed=1)
    for batch in packing.epoch_batches(0, batch_tokens=tokens):
        parts = packing.cut(batch, batch_tokens=smaller, batch_rows=rows)
        assert np.concatenate(parts).tolist() == batch.tolist()
        for part in parts:
            bins = packing.split(part)
            padded = len(bins) * max(int(lengths.tokens[own].sum()) for own in bins)
            if part.size > 1:
                assert padded <= smaller and (rows is None or lengths.rows[part].sum() <= rows)
    assert all(
        len(packing.cut(batch, batch_tokens=tokens)) == 1
        for batch in packing.epoch_batches(0, batch_tokens=tokens)
        if tokens >= capacity
    )
