"""The fused LoRA layer gives what PEFT's own forward gives, and steps aside where it cannot."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from mmtune.models.lora_linear import fuse_lora, read_apart


class Two(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 20, bias=bias), nn.Linear(20, 7, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x)))


def adapted(bias: bool = True, **options):
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["one", "two"], **options})
    model = get_peft_model(Two(bias), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
    return model


def results(model, x, autocast):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
        loss = y.float().square().sum()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), {"x": x.grad, **gradients}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", [(5, 12), (2, 5, 12)])
def test_output_and_every_gradient_are_pefts(bias, rslora, autocast, shape):
    theirs = adapted(bias, use_rslora=rslora)
    ours = deepcopy(theirs)
    assert fuse_lora(ours) == 2
    x = torch.randn(shape)
    (y, wanted), (found_y, found) = results(theirs, x, autocast), results(ours, x, autocast)
    assert found_y.dtype == y.dtype and found.keys() == wanted.keys()
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if autocast else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found_y, y, **tolerance)
    for name, gradient in wanted.items():
        assert found[name].dtype == gradient.dtype
        norm = gradient.float().norm()
        assert (found[name] - gradient).float().norm() <= (2e-2 if autocast else 1e-6) * norm, name


@pytest.mark.parametrize("sizes", [[(4, 2)], [(4, 2), (3, 1), (6, 2)]])
def test_gradients_equal_numeric_ones(sizes):
    from mmtune.models.lora_linear import _LoraLinears

    torch.manual_seed(1)

    def drawn(*shape):
        return torch.randn(shape, dtype=torch.float64)

    weights, biases = [drawn(outputs, 5) for outputs, _ in sizes], [drawn(outputs) for outputs, _ in sizes]
    adapters = [drawn(rank, 5) for _, rank in sizes] + [drawn(outputs, rank) for outputs, rank in sizes]
    trained = [value.requires_grad_() for value in (drawn(3, 5), *adapters)]
    assert torch.autograd.gradcheck(lambda x, *ab: _LoraLinears.apply(x, 1.5, *weights, *biases, *ab), trained)


class Attention(nn.Module):
    """Queries of one input, keys and values of the same or of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(12, 8), nn.Linear(12, 4), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        read = x if other is None else other
        return torch.cat([self.q_proj(x), self.k_proj(read), self.v_proj(read)], -1)


@pytest.fixture
def readers(monkeypatch):
    """Attention by PEFT, the same fused, and how many layers each operation of the fused one had."""
    from mmtune.models import lora_linear

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj"], rank_pattern={"v_proj": 2})
    config.alpha_pattern = {"v_proj": 3}
    theirs = get_peft_model(Attention(), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
    ours, counts, run = deepcopy(theirs), [], lora_linear._run
    assert fuse_lora(ours) == 3
    monkeypatch.setattr(lora_linear, "_run", lambda layers, x: (counts.append(len(layers)), run(layers, x))[1])
    return theirs, deepcopy(ours), counts


def same(theirs, ours, *inputs):
    """Output and gradients of both are the same; the gradients are cleared."""
    for model in (theirs, ours):
        model.zero_grad()
    x, found = [[value.clone().requires_grad_() for value in inputs] for _ in range(2)]
    y, made = theirs(*x), ours(*found)
    torch.testing.assert_close(made, y, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    made.square().sum().backward()
    torch.testing.assert_close([each.grad for each in found], [each.grad for each in x], rtol=1e-5, atol=1e-5)
    for (name, own), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-5, atol=1e-5, msg=name)


def test_layers_that_read_one_input_are_one_operation(readers):
    theirs, ours, counts = readers
    for _ in range(2):
        same(theirs, ours, torch.randn(2, 5, 12))
    assert counts == [3, 3]


def test_a_layer_that_is_hooked_to_read_other_tokens_is_one_by_itself(readers):
    theirs, ours, counts = readers
    for model in (theirs, ours):
        model.base_model.model.q_proj.register_forward_pre_hook(lambda _, given: (given[0].flip(0),))
    same(theirs, ours, torch.randn(5, 12))
    assert counts == [1, 2]


def test_layers_that_turn_out_to_read_something_else_are_apart_from_then_on(readers):
    theirs, ours, counts = readers
    x, other = torch.randn(5, 12), torch.randn(5, 12)
    same(theirs, ours, x, other)
    same(theirs, ours, x)
    assert counts == [3, 1, 1, 1, 1, 1]


def test_an_input_that_changes_between_two_layers_is_read_again(readers):
    theirs, ours, _ = readers
    wanted, found = [], []
    for model, made in ((theirs, wanted), (ours, found)):
        x, inner = torch.ones(5, 12), model.base_model.model
        made += [inner.q_proj(x), inner.k_proj(x.mul_(2)), inner.v_proj(x)]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}])
def test_other_kinds_keep_pefts_forward(options):
    assert fuse_lora(adapted(**options)) == 0


def test_a_disabled_or_merged_adapter_keeps_its_meaning():
    model = adapted()
    x = torch.randn(3, 12)
    with model.disable_adapter():
        plain = model(x)
    tuned = model(x)
    fuse_lora(model)
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    torch.testing.assert_close(model(x), tuned, rtol=1e-5, atol=1e-6)
    model.merge_adapter()
    torch.testing.assert_close(model(x), tuned, rtol=1e-4, atol=1e-5)


def test_a_frozen_input_asks_for_no_gradient():
    model = adapted()
    fuse_lora(model)
    with torch.no_grad():
        assert not model(torch.randn(3, 12)).requires_grad
    assert model(torch.randn(3, 12)).requires_grad


def test_layers_told_to_read_apart_do(readers):
    _, ours, counts = readers
    read_apart(ours)
    ours(torch.randn(5, 12)).sum().backward()
    assert counts == [1, 1, 1]
