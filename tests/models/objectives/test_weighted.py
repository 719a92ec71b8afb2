"""The total equals its parts, in value and in gradient; weight 0 leaves no trace."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.errors import RecipeError
from mmtune.models.objectives.weighted import check_weights, weighted_sum

NAMES = ("caption", "contrast", "reconstruction")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=3, max_size=3).filter(any), st.integers(0, 1000))
def test_the_total_is_its_weighted_parts(weights, seed):
    x = torch.randn(4, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    losses = dict(zip(NAMES, (x.square().sum(), x.sin().sum(), x.abs().sum()), strict=True))
    weights = dict(zip(NAMES, weights, strict=True))
    total = weighted_sum(losses, weights)
    assert total.item() == pytest.approx(sum(weights[name] * losses[name].item() for name in NAMES), abs=1e-6, rel=1e-6)
    (gradient,) = torch.autograd.grad(total, x, retain_graph=True)
    parts = [weights[name] * torch.autograd.grad(loss, x, retain_graph=True)[0] for name, loss in losses.items()]
    torch.testing.assert_close(gradient, sum(parts), atol=1e-6, rtol=1e-6)


def test_weight_zero_leaves_no_trace_and_needs_no_loss():
    loss, broken = torch.tensor(2.0), torch.tensor(float("nan"))
    weights = {"caption": 1.0, "contrast": 0.0}
    assert weighted_sum({"caption": loss, "contrast": broken}, weights) == 2.0
    assert weighted_sum({"caption": loss}, weights) == 2.0


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"caption": 0.0, "contrast": 0.0}, "sum to 0"),
        ({}, "sum to 0"),
        ({"caption": -1.0, "contrast": 1.0}, "caption is -1.0"),
        ({"caption": float("nan"), "contrast": 1.0}, "caption is nan"),
    ],
)
def test_weights_that_train_nothing_are_refused(weights, said):
    with pytest.raises(RecipeError, match=said):
        check_weights(weights)


def test_a_loss_without_a_weight_is_refused():
    with pytest.raises(RecipeError, match="match has no weight"):
        weighted_sum({"match": torch.tensor(1.0)}, {"caption": 1.0})
