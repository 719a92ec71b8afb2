"""What is rehearsed: the micro batches that need the most memory, of either kind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from mmtune.errors import ResourceError
from mmtune.training.batching import Batching
from mmtune.training.engine import Plain
from mmtune.training.loss import answer_loss
from mmtune.training.plan import Plan, TreeSizes
from mmtune.training.rehearsal import heaviest, rehearse
from mmtune.training.unfreezing import Unfreezing, in_stages
from tests.training.course import Rows, tiny_model


def test_the_most_tokens_come_last() -> None:
    tokens, none = np.array([3, 9, 5]), np.zeros(3, int)
    assert heaviest(tokens, np.array([4, 1, 2]), none, again=False) == [0, 1]
    assert heaviest(tokens, np.array([1, 4, 4]), none, again=False) == [1]
    assert heaviest(tokens, none, none, again=True) == [1, 1]
    assert heaviest(tokens, np.array([4, 1, 2]), np.array([0, 1, 2]), again=False) == [0, 2, 1]
    assert heaviest(tokens, np.array([4, 1, 2]), np.array([3, 1, 2]), again=False) == [0, 1]


@pytest.fixture
def batching() -> Any:
    AcceleratorState._reset_state()
    rows, one = Rows(6, pictures=frozenset({4})), np.ones(6, int)
    sizes = TreeSizes(one, np.array([5, 6, 12, 7, 8, 9]), one, np.array([0, 0, 0, 0, 4, 0]))
    plan = Plan(sizes, 0, 12, 1, 1, 1.0)
    return SimpleNamespace(plan=plan, batches=rows, loss=answer_loss)


def test_both_are_run_and_the_model_is_as_before(batching: Any) -> None:
    model = tiny_model().eval()
    found = rehearse(model, Plain(model, None), batching, Accelerator(cpu=True))
    assert batching.batches.seen == [4, 2]
    assert (found.rows, found.tokens) == (1, 12) and found.mean_share == pytest.approx(47 / 72)
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_memory_that_runs_out_over_media_names_the_rows(batching: Any, monkeypatch: Any) -> None:
    def loss(model: Any, batch: Any) -> Any:
        if "pixel_values" in batch:
            raise torch.OutOfMemoryError("out of memory")
        return answer_loss(model, batch)

    batching.loss = loss
    model = tiny_model()
    with pytest.raises(ResourceError, match="row-4"):
        rehearse(model, Plain(model, None), batching, Accelerator(cpu=True))


def test_a_tower_that_starts_frozen_is_rehearsed_as_it_trains_later(batching: Any) -> None:
    model, moved = tiny_model(), set[str]()
    plan = batching.plan
    assert plan.total_steps > 3
    staged = in_stages(Batching(plan, batching.batches, answer_loss, (1, 1)), Unfreezing(model, {"vision": 3}))

    class Watched(Plain):
        def forget(self) -> None:
            moved.update(name for name, parameter in model.named_parameters() if parameter.grad is not None)
            super().forget()

    rehearse(model, Watched(model, None), staged, Accelerator(cpu=True))
    assert any("vision_tower" in name for name in moved)
