"""The order is a pure function of seed, epoch and position; every tree once per epoch."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.errors import DataError
from mmtune.training.plan import Plan, TreeSizes, order, split_ranks, step_seed


def sizes(rows, tokens):
    rows = np.asarray(rows)
    tokens = np.asarray(tokens, dtype=int)
    return TreeSizes(rows, tokens, rows * 2, tokens * (tokens % 3) // 3)


plans = st.builds(
    lambda pairs, tokens, rows, micro, seed, epochs, media: Plan(
        sizes([r for r, _ in pairs], [n for _, n in pairs]), seed, tokens, rows, micro, epochs, batch_media_tokens=media
    ),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 300)), min_size=1, max_size=40),
    st.integers(50, 2000),
    st.one_of(st.none(), st.integers(1, 16)),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.5, 1.0, 2.0, 2.5]),
    st.one_of(st.none(), st.integers(1, 500)),
)


@settings(max_examples=60, deadline=None)
@given(plans)
def test_every_tree_stands_once_in_an_epoch_and_batches_keep_their_limits(plan):
    batches = plan.epoch_batches(3)
    assert sorted(np.concatenate(batches)) == list(range(plan.sizes.rows.size))
    for batch in batches:
        rows, longest = plan.sizes.rows[batch].sum(), plan.sizes.tokens[batch].max()
        assert len(batch) == 1 or rows * longest <= plan.batch_tokens
        assert len(batch) == 1 or plan.batch_media_tokens is None or plan.media(batch) <= plan.batch_media_tokens
        assert len(batch) == 1 or plan.batch_rows is None or rows <= plan.batch_rows


@settings(max_examples=40, deadline=None)
@given(plans, st.integers(0, 30))
def test_a_resumed_run_sees_the_rest_of_the_unbroken_one(plan, start):
    whole = [[b.tolist() for b in step] for step in plan.steps()]
    assert len(whole) == plan.total_steps
    assert [[b.tolist() for b in step] for step in plan.steps(start)] == whole[start:]


@settings(max_examples=40, deadline=None)
@given(plans, st.integers(1, 4))
def test_ranks_share_a_step_without_loss(plan, world):
    for step in plan.steps():
        parts = [plan.shares(step, rank, world) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        assert sorted(position for part in parts for position, counts in part if counts) == list(range(len(step)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=24), st.integers(2, 4))
def test_ranks_do_things_of_like_cost_at_the_same_time(costs, world):
    parts = [split_ranks(costs, rank, world) for rank in range(world)]
    totals = [sum(costs[position] for position, counts in part if counts) for part in parts]
    # Dealt in turns, two ranks are never further apart than the dearest batch.
    assert max(totals) - min(totals) <= max(costs)
    turns = [[costs[part[turn][0]] for part in parts] for turn in range(len(parts[0]))]
    assert all(min(early) >= max(late) for early, late in itertools.pairwise(turns))
    assert all(costs[position] == min(costs) for part in parts for position, counts in part if not counts)


def test_one_rank_keeps_the_order():
    assert split_ranks([3, 9, 1], 0, 1) == [(0, True), (1, True), (2, True)]
    assert [[position for position, _ in split_ranks([3, 9, 1, 8], rank, 2)] for rank in range(2)] == [[1, 2], [3, 0]]


def test_orders_differ_by_seed_and_epoch():
    assert order(0, 0, 50).tolist() == order(0, 0, 50).tolist()
    assert len({tuple(order(seed, epoch, 50)) for seed in range(3) for epoch in range(3)}) == 9
    assert len({step_seed(s, t, r) for s in range(3) for t in range(3) for r in range(3)}) == 27


def test_no_rows_is_an_error():
    with pytest.raises(DataError):
        Plan(sizes([], []), 0, 100, None, 1, 1.0).epoch_batches(0)
