"""Products by oneDNN: PyTorch's numbers and gradients, few kernels, and PyTorch's own way where they do not fit."""

from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mmtune.models import products
from mmtune.models.fused_parts import fused_parts
from mmtune.models.linear import fuse_linears, fused_linears
from mmtune.models.load import load_to_answer
from mmtune.models.lora_linear import fuse_lora
from mmtune.models.products import has_onednn, times, times_transposed
from mmtune.models.unimodal import load_unimodal
from mmtune.training.surroundings import surroundings

pytestmark = pytest.mark.skipif(not has_onednn(), reason="this PyTorch multiplies no dense matrices by oneDNN")


@pytest.fixture
def asked(monkeypatch):
    """Takes oneDNN for every product, on whatever processor; gives the shapes that came to it."""
    own, shapes = products._linear(), []

    def noted(x, weight, *more):
        shapes.append((*x.shape, len(weight)))
        return own(x, weight, *more)

    monkeypatch.setattr(products, "_LEAST", 0)
    monkeypatch.setattr(products, "has_wide_products", lambda: True)
    monkeypatch.setattr("mmtune.models.linear.has_wide_products", lambda: True)
    monkeypatch.setattr(products, "_linear", lambda: noted)
    return shapes


@pytest.mark.parametrize("tokens", [2, 7, 8, 9, 100, 298])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("turned", [False, True], ids=["as it is", "transposed"])
def test_a_product_is_pytorchs(asked, tokens, bias, turned):
    torch.manual_seed(0)
    weight = torch.randn(24, 40).t() if turned else torch.randn(40, 24)
    x, bias_O = torch.randn(tokens, 24), torch.randn(40) if bias else None
    made, wanted = times(x, weight, bias_O), nn.functional.linear(x, weight, bias_O)
    assert made.shape == wanted.shape and made.is_contiguous() and len(asked) == 1
    assert (made - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("tokens", [9, 16], ids=["filled up", "as they are"])
def test_rows_with_gaps_between_them_are_multiplied_as_they_stand(asked, tokens):
    x, weight = torch.randn(tokens, 60)[:, 10:34], torch.randn(40, 24)
    for given_x in (x, torch.randn(24, tokens).t(), torch.randn(1, 24).expand(tokens, 24)):
        assert torch.allclose(times(given_x, weight), given_x @ weight.t(), rtol=1e-5, atol=1e-5)
    assert asked == [(16, 24, 40)] * 3


@pytest.mark.parametrize("tokens", [2, 9, 100])
@pytest.mark.parametrize("outputs, inputs", [(40, 24), (24, 40)])
def test_the_gradient_of_a_weight_is_pytorchs(asked, tokens, outputs, inputs):
    grad, x = torch.randn(tokens, outputs), torch.randn(tokens, inputs)
    made, wanted = times_transposed(grad, x), grad.t() @ x
    assert made.shape == wanted.shape and (made - wanted).norm() <= 1e-6 * wanted.norm() and len(asked) == 1


@given(st.integers(1, 1 << 20))
def test_tokens_are_filled_up_by_a_sixteenth_at_most_to_one_of_few_numbers(tokens):
    full = products._round(tokens)
    assert tokens <= full <= tokens + max(tokens // 16, 7) and products._round(full) == full


def test_a_thousand_lengths_are_a_hundred_kernels(asked):
    weight = torch.randn(8, 8)
    for tokens in range(2, 1002):
        times(torch.randn(tokens, 8), weight)
    assert len(asked) == 1000 and len(set(asked)) < 100


@pytest.mark.parametrize(
    "x, weight",
    [
        (torch.randn(9, 24).bfloat16(), torch.randn(40, 24).bfloat16()),
        (torch.randn(9, 24).double(), torch.randn(40, 24).double()),
        (torch.randn(9, 24), torch.randn(40, 48)[:, ::2]),
    ],
    ids=["bf16", "fp64", "weights with gaps"],
)
def test_what_does_not_fit_goes_pytorchs_own_way(asked, x, weight):
    assert torch.equal(times(x, weight), x @ weight.t()) and not asked


def test_one_token_goes_pytorchs_own_way(asked):
    layer, x = nn.Linear(24, 40), torch.randn(1, 24)
    with fused_linears(layer):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias)) and layer(x[0]).shape == (40,)
    assert not asked


@pytest.mark.parametrize("tokens", [2, 900])
def test_a_small_layer_goes_pytorchs_own_way_whatever_it_is_given(asked, monkeypatch, tokens):
    monkeypatch.setattr(products, "_LEAST", 24 * 40 + 1)
    x, weight, grad = torch.randn(tokens, 24), torch.randn(40, 24), torch.randn(tokens, 40)
    assert torch.equal(times(x, weight), x @ weight.t()) and torch.equal(times_transposed(grad, x), grad.t() @ x)
    assert not asked
    monkeypatch.setattr(products, "_LEAST", 24 * 40)
    times(x, weight), times_transposed(grad, x)
    assert len(asked) == 2


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (2, 3, 4, 24)])
def test_a_layer_and_its_gradients_are_pytorchs(asked, shape, bias, frozen):
    torch.manual_seed(0)
    theirs = nn.Linear(24, 40, bias=bias).requires_grad_(not frozen)
    ours, x, upstream = deepcopy(theirs), torch.randn(shape), torch.randn(*shape[:-1], 40)

    def results(layer):
        own = x.clone().requires_grad_()
        made = layer(own)
        made.backward(upstream)
        return [made.detach(), own.grad, *(parameter.grad for parameter in layer.parameters() if not frozen)]

    wanted = results(theirs)
    with fused_linears(ours) as fused:
        assert fused == 1
        found = results(ours)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and (one - other).norm() <= 1e-6 * other.norm()
    assert len(asked) == (2 if frozen else 3) and "forward" not in vars(ours)


def test_gradients_of_gradients_are_pytorchs(asked):
    torch.manual_seed(0)
    theirs, x = nn.Linear(24, 40), torch.randn(3, 24)
    ours = deepcopy(theirs)

    def penalty(layer):
        own = x.clone().requires_grad_()
        slopes = torch.autograd.grad(layer(own).tanh().sum(), [own, *layer.parameters()], create_graph=True)
        sum(slope.square().sum() for slope in slopes).backward()
        return [own.grad, layer.weight.grad, layer.bias.grad]

    wanted = penalty(theirs)
    with fused_linears(ours):
        found = penalty(ours)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
    assert asked


@pytest.mark.parametrize("lora", [False, True])
def test_what_a_layer_makes_may_be_written_into(asked, lora):
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(24, 40), nn.ReLU(inplace=True)), torch.randn(3, 24)
    if lora:
        layer = get_peft_model(layer, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
        assert fuse_lora(layer) == 1
    found = []
    for context in (nullcontext(), fused_linears(layer)):
        with context:
            own = x.clone().requires_grad_()
            layer(own).sum().backward()
            found.append(own.grad)
    assert (found[0] - found[1]).norm() <= 1e-6 * found[0].norm() and asked


def test_a_layer_that_nothing_trains_in_leaves_no_graph(asked):
    layer = nn.Linear(24, 40).requires_grad_(False)
    assert fuse_linears(layer) == 1 and fuse_linears(layer) == 0
    assert not layer(torch.randn(3, 24)).requires_grad and len(asked) == 1
    other = deepcopy(layer)
    other.weight.data.zero_()
    assert torch.equal(other(torch.randn(3, 24)), other.bias.expand(3, -1))


def test_under_autocast_a_layer_computes_in_its_type(asked):
    layer, x = nn.Linear(24, 40), torch.randn(3, 24)
    with fused_linears(layer), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16 and not asked


def test_no_layer_is_touched_where_pytorchs_own_products_are_the_fastest(monkeypatch):
    monkeypatch.setattr("mmtune.models.linear.has_wide_products", lambda: False)
    layer = nn.Linear(24, 40)
    with fused_linears(layer) as fused:
        assert fused == 0 and fuse_linears(layer) == 0 and "forward" not in vars(layer)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], None])
def test_a_model_trains_by_the_same_gradients(asked, targets):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4)
    )
    if targets:
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False))
        fuse_lora(model)
    ids, found = torch.randint(0, 50, (2, 13)), []
    for context in (nullcontext(), fused_parts(model)):
        before = len(asked)
        with context:
            model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(asked) > before + 14 and len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_models_that_answer_and_encode_multiply_so(asked, tiny_vlm):
    encoder, answerer = load_unimodal(str(tiny_vlm), "image").model, load_to_answer(str(tiny_vlm), None)
    for model in (encoder, answerer):
        layers = [layer for layer in model.modules() if type(layer) is nn.Linear]
        assert layers and all("forward" in vars(layer) for layer in layers)


def test_what_multiplies_is_one_of_the_surroundings_of_a_run(monkeypatch, tiny_vlm):
    model, cpu = load_to_answer(str(tiny_vlm), None), SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    found = []
    for wide in (False, True):
        monkeypatch.setattr("mmtune.training.surroundings.has_wide_products", lambda wide=wide: wide)
        found.append(surroundings(model, cpu, {})["products"])
    assert found == ["PyTorch", "oneDNN"]


AMD, INTEL = "vendor_id : AuthenticAMD\n", "vendor_id : GenuineIntel\n"


@pytest.mark.parametrize(
    "told, capability, wide",
    [
        (AMD + "cpu family\t: 26\n", "AVX512", True),
        (AMD + "cpu family\t: 26\n", "AVX2", False),
        (AMD + "cpu family\t: 25\n", "AVX512", False),
        (AMD, "AVX512", False),
        (INTEL + "cpu family\t: 26\n", "AVX512", False),
        (None, "AVX512", False),
    ],
)
def test_onednn_is_taken_on_processors_of_amd_with_whole_avx512(monkeypatch, tmp_path, told, capability, wide):
    file = tmp_path / "cpuinfo"
    if told is not None:
        file.write_text(told)
    monkeypatch.setattr(products, "_CPUINFO", file)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products.has_wide_products.__wrapped__() is wide


def test_another_pytorch_without_that_product_is_no_error(monkeypatch):
    def gone():
        raise AttributeError("_linear_pointwise")

    monkeypatch.setattr(products, "_linear", gone)
    assert products.has_onednn.__wrapped__() is False
