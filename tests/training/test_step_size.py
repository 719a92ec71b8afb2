"""Micro batches may change while a run is stopped, as long as its steps stay as large."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtune.training.plan import Plan, TreeSizes, row_batches
from mmtune.training.step_size import StepSize, planned_size


@pytest.mark.parametrize(
    ("own", "takes_over"),
    [
        (StepSize(4, 512, 4), True),
        (StepSize(1, 2048, 16), True),
        (StepSize(2, 1024, 8, 300), True),
        (StepSize(2, 1024, 4), False),
        (StepSize(2, 512, 8), False),
        (StepSize(2, 1024), False),
    ],
)
def test_a_run_goes_on_by_the_plan_of_its_checkpoint(own: StepSize, takes_over: bool) -> None:
    before = StepSize(2, 1024, 8)
    assert planned_size(own, {"step_size": asdict(before)}) == (before if takes_over else own)
    assert planned_size(own, None) == own


@given(
    tokens=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    larger=st.integers(30, 200),
    times=st.integers(1, 5),
    rows=st.none() | st.integers(1, 6),
)
def test_smaller_micro_batches_hold_the_same_rows_in_the_same_steps(
    tokens: list[int], larger: int, times: int, rows: int | None
) -> None:
    ones = np.ones(len(tokens), np.int64)
    sizes = TreeSizes(ones, np.array(tokens), ones, 0 * ones)
    course = {"sizes": sizes, "seed": 3, "batch_tokens": larger, "batch_rows": None, "micro_batches": 2, "epochs": 2.0}
    limits = {"batch_tokens": larger // times, "batch_rows": rows, "batch_media_tokens": None}
    plan, cut = Plan(**course), Plan(**course, cut=lambda batch: row_batches(batch, sizes, **limits))
    assert plan.total_steps == cut.total_steps
    for whole, parts in zip(plan.steps(), cut.steps(), strict=True):
        assert np.concatenate(parts).tolist() == np.concatenate(whole).tolist()
        assert plan.targets(whole) == plan.targets(parts)
        for part in parts:
            assert part.size == 1 or part.size * sizes.tokens[part].max() <= larger // times
            assert rows is None or part.size <= rows


def test_a_step_comes_out_as_large_in_other_micro_batches_where_it_can():
    size = StepSize(1, 8192, 8)
    assert size.in_micro_batches(2) == StepSize(2, 4096, 4) and size.in_micro_batches(2).is_as_large_as(size)
    assert StepSize(2, 10).in_micro_batches(1) == StepSize(1, 20)
    assert size.micro_batches_like(StepSize(1, 4096, 4)) == 2 and size.micro_batches_like(StepSize(1, 4096, 8)) is None
    assert size.in_micro_batches(3) is None and StepSize(1, 9, 3).in_micro_batches(2) is None
