"""The fused LoRA layer gives what PEFT's own forward gives, and steps aside where it cannot."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from mmtune.models.lora_linear import fuse_lora


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


def test_gradients_equal_numeric_ones():
    from mmtune.models.lora_linear import _LoraLinear

    torch.manual_seed(1)
    sizes = [(3, 5), (4, 5), (4,), (2, 5), (4, 2)]
    x, weight, bias, a, b = (torch.randn(size, dtype=torch.float64) for size in sizes)
    trained = [value.requires_grad_() for value in (x, a, b)]
    assert torch.autograd.gradcheck(lambda x, a, b: _LoraLinear.apply(x, weight, bias, a, b, 1.5), trained)


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


def test_gradients_of_gradients_are_refused_and_not_wrong():
    ours, x = adapted(), torch.randn(5, 12, requires_grad=True)
    assert fuse_lora(ours) == 2
    (slope,) = torch.autograd.grad(ours(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()
