"""The learning rate equals transformers' schedules; the optimizer state survives a round trip."""

import pytest
import torch
from transformers import get_scheduler

from mmtune.training.optimizer import learning_rate, load_optimizer_state, make_adamw, optimizer_state


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_after_warm_up_it_equals_transformers(schedule):
    parameter = torch.nn.Parameter(torch.zeros(1))
    name = "constant_with_warmup" if schedule == "constant" else schedule
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=10, num_training_steps=100)
    for step in range(100):
        ours = learning_rate(step, peak=0.5, total=100, warmup=10, schedule=schedule)
        if step >= 10:
            assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        else:
            # Ours starts above zero, so that the first step moves something.
            assert 0 < ours < 0.5
        optimizer.step()
        theirs.step()


def test_warm_up_as_a_share():
    assert learning_rate(4, peak=1.0, total=100, warmup=0.05, schedule="linear") < 1.0
    assert learning_rate(5, peak=1.0, total=100, warmup=0.05, schedule="linear") == 1.0


def test_state_round_trip_continues_identically():
    def run(steps, state=None, weights=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = make_adamw(model, rate=0.1, weight_decay=0.01, beta2=0.99)
        if state:
            model.load_state_dict(weights)
            load_optimizer_state(optimizer, model, state)
        for step in steps:
            model(torch.full((1, 3), float(step))).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    whole, _ = run(range(1, 7))
    half, optimizer = run(range(1, 4))
    weights = {name: value.clone() for name, value in half.state_dict().items()}
    resumed, _ = run(range(4, 7), optimizer_state(optimizer, half), weights)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
