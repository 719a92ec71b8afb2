"""Losses by task sum to the whole."""

import pytest
import torch

from mmtune.models.objectives.tasks import task_losses


def test_losses_by_task_sum_to_the_whole():
    loss, task = torch.rand(6), torch.tensor([0, 2, 2, 0, 2, 0])
    parts = task_losses(loss, task, ["vqa", "caption", "count"])
    assert list(parts) == ["vqa", "count"] and [count for _, count in parts.values()] == [3, 3]
    assert sum(total for total, _ in parts.values()) == pytest.approx(float(loss.sum()), rel=1e-6)
    assert parts["count"][0] == pytest.approx(float(loss[[1, 2, 4]].sum()), rel=1e-6)
