"""Masked attention equals the formula by hand, and a query that sees nothing gets zeros, not NaN."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.models.fusion.attention import Attention, attend


def by_hand(query, key, value, seen):
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1) @ value


def tensors(seed, rows=2, heads=3, queries=4, keys=5, width=8):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, heads, n, width) for n in (queries, keys, keys)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 6))
def test_values_and_gradients_are_the_formulas(seed, queries, keys):
    parts = tensors(seed, queries=queries, keys=keys)
    seen = torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(seed)) < 0.6
    seen[..., 0] = True
    found, wanted = attend(*parts, seen), by_hand(*parts, seen)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    slope = torch.randn(found.shape)
    for ours, theirs in zip(
        torch.autograd.grad((found * slope).sum(), parts),
        torch.autograd.grad((wanted * slope).sum(), parts),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_masked_slots_have_a_gradient_of_exactly_zero():
    query, key, value = tensors(0)
    seen = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    seen[0, ..., 3:] = False
    attend(query, key, value, seen).square().sum().backward()
    for part in (key, value):
        assert part.grad[0, :, 3:].abs().max() == 0.0
        assert part.grad[0, :, :3].abs().min() > 0.0
        assert part.grad[1].abs().min() > 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_sees_nothing_gets_zeros_and_finite_gradients(dtype):
    parts = [part.detach().to(dtype).requires_grad_() for part in tensors(1)]
    seen = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    seen[0, :, 2] = False
    seen[1] = False
    made = attend(*parts, seen)
    assert made[0, :, 2].abs().max() == 0.0 and made[1].abs().max() == 0.0
    assert made[0, :, 0].abs().min() > 0.0
    made.float().square().sum().backward()
    assert all(part.grad.isfinite().all() for part in parts)
    assert all(part.grad[1].abs().max() == 0.0 for part in parts)


def test_a_layer_equals_torchs_multihead_attention():
    torch.manual_seed(0)
    ours = Attention(12, 3, source_width=7)
    theirs = torch.nn.MultiheadAttention(12, 3, kdim=7, vdim=7, batch_first=True)
    with torch.no_grad():
        for name in ("query", "key", "value"):
            getattr(theirs, f"{name[0]}_proj_weight").copy_(getattr(ours, name).weight)
        theirs.in_proj_bias.copy_(torch.cat([getattr(ours, name).bias for name in ("query", "key", "value")]))
        theirs.out_proj.load_state_dict(ours.output.state_dict())
    hidden, source = torch.randn(2, 4, 12), torch.randn(2, 5, 7)
    seen = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], dtype=torch.bool)
    wanted, _ = theirs(hidden, source, source, key_padding_mask=~seen)
    torch.testing.assert_close(ours(hidden, source, seen), wanted, rtol=1e-5, atol=1e-6)
    each = seen[:, None].expand(-1, 4, -1)
    torch.testing.assert_close(ours(hidden, source, each), wanted, rtol=1e-5, atol=1e-6)


def test_a_layers_bias_does_not_reach_a_token_that_sees_nothing():
    layer = Attention(8, 2)
    torch.nn.init.ones_(layer.output.bias)
    hidden = torch.randn(2, 3, 8)
    made = layer(hidden, hidden, torch.tensor([[True] * 3, [False] * 3]))
    assert made[1].abs().max() == 0.0 and made[0].abs().max() > 0.0


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="10 does not divide by 4 heads"):
        Attention(10, 4)
