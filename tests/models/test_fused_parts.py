"""Norms and rotary positions as one operation: transformers' numbers and gradients, and a way back."""

from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.glm4.modeling_glm4 import apply_rotary_pos_emb as rotate_parts
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from mmtune.models.fused_parts import fused_parts
from mmtune.models.rms_norm import fused_rms_norms
from mmtune.models.rotary import _Fused, _is_plain, fused_rotary


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (2, 3, 4, 48)])
def test_norm_and_its_gradients_are_llamas(shape, frozen):
    torch.manual_seed(0)
    theirs = LlamaRMSNorm(48, eps=1e-3)
    theirs.weight.data.uniform_(-2.0, 2.0)
    theirs.weight.requires_grad_(not frozen)
    ours, x, upstream = deepcopy(theirs), 3 * torch.randn(shape), torch.randn(shape)
    x[..., 0, :] *= 1e-3  # small enough for epsilon to matter

    def results(module):
        given = x.clone().requires_grad_()
        made = module(given)
        made.backward(upstream)
        return [made.detach(), given.grad, *([] if frozen else [module.weight.grad])]

    wanted = results(theirs)
    with fused_rms_norms(ours) as fused:
        assert fused == 1
        found = results(ours)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()
    assert "forward" not in vars(ours)


def test_norms_of_another_kind_or_type_keep_their_own_way():
    gemma, half = Gemma3RMSNorm(8), LlamaRMSNorm(8).bfloat16()
    single = LlamaRMSNorm(8)
    with fused_rms_norms(nn.ModuleList([gemma, half])) as fused:
        assert fused == 0
    x = torch.randn(3, 8).bfloat16()
    with fused_rms_norms(single):
        assert torch.equal(single(x), type(single).forward(single, x))


def rotated(function, shapes, dim=1):
    torch.manual_seed(0)
    (rows, heads, groups, tokens, width) = shapes
    # As layers make them: heads behind tokens in memory.
    q = torch.randn(rows, tokens, heads, width).transpose(1, 2).requires_grad_()
    k = torch.randn(rows, tokens, groups, width).transpose(1, 2).requires_grad_()
    cos, sin = torch.randn(rows, tokens, width), torch.randn(rows, tokens, width)
    made = function(q, k, cos, sin, unsqueeze_dim=dim)
    sum((one * torch.randn_like(one)).sum() for one in made).backward()
    return [*(one.detach() for one in made), q.grad, k.grad]


@pytest.mark.parametrize("part", [0.5, 1.0])
def test_a_family_that_rotates_a_part_of_each_head_trains_as_by_its_own(part):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": part}
    config = Phi3Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0,
        num_key_value_heads=1, rope_parameters=rope,
    )  # fmt: skip
    model, found = Phi3ForCausalLM(config), []
    input_ids = torch.randint(0, 50, (2, 9))
    for context in (nullcontext(), fused_parts(model)):
        with context:
            model.zero_grad()
            model(input_ids=input_ids, labels=input_ids).loss.backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("shapes", [(1, 5, 5, 7, 64), (3, 4, 2, 6, 8), (2, 1, 1, 1, 2)])
def test_rotation_and_its_gradients_are_llamas(shapes):
    wanted, found = rotated(apply_rotary_pos_emb, shapes), rotated(_Fused(apply_rotary_pos_emb), shapes)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()
        assert one.stride() == other.stride()


def test_other_rotations_are_left_alone():
    assert _is_plain(apply_rotary_pos_emb)
    assert not _is_plain(rotate_parts)
    assert not _is_plain(lambda q, k, cos, sin, unsqueeze_dim=1: (q, k))
    assert not _is_plain(None)
    assert not _is_plain(SimpleNamespace())


def test_a_language_model_trains_by_them_as_by_its_own_and_has_its_own_back_after_an_error():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model, own = LlamaForCausalLM(config), modeling_llama.apply_rotary_pos_emb
    input_ids = torch.randint(0, 50, (2, 9))

    def gradients():
        model.zero_grad()
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    wanted = gradients()
    with pytest.raises(KeyError), fused_rms_norms(model) as norms, fused_rotary(model) as files, fused_parts(model):
        assert (norms, files) == (5, 1)
        found = gradients()
        raise KeyError
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert modeling_llama.apply_rotary_pos_emb is own
    again = gradients()
    assert all(torch.equal(again[name], gradient) for name, gradient in wanted.items())
