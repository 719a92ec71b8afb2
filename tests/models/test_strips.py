"""Attention in strips: PyTorch's own values and gradients, for any cut of a row and any mask."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mmtune.models.strips import Strip, attend

HIDDEN = torch.finfo(torch.float64).min
Spans = tuple[tuple[int, int], ...]


def strips_of(mask_TT: torch.Tensor, cuts: list[tuple[tuple[int, int], Spans]]) -> list[Strip]:
    return [
        Strip(queries, keys, torch.cat([mask_TT[slice(*queries), slice(*span)] for span in keys], dim=1))
        for queries, keys in cuts
    ]


@pytest.mark.parametrize(
    ("middle", "last"), [(((0, 8),), ((0, 5), (8, 11))), (((0, 8),), ((0, 11),)), (((0, 11),), ((0, 11),))]
)
@pytest.mark.parametrize(("heads", "asked"), [(4, 4), (6, 2), (3, 1)])
def test_values_and_gradients_are_those_of_pytorch(heads: int, asked: int, middle: Spans, last: Spans) -> None:
    """Causal strips of a prefix, and a branch that sees the beginning and itself; values wider than keys.

    Strips are asked of what they see, or of the whole row, part of which is hidden.
    """
    torch.manual_seed(0)
    tokens, at = 11, torch.arange(11)
    seen_TT = at[:, None] >= at
    seen_TT[8:, 5:8] = False
    mask_TT = torch.zeros(tokens, tokens, dtype=torch.float64).masked_fill(~seen_TT, HIDDEN)
    strips = strips_of(mask_TT, [((0, 3), ((0, 3),)), ((3, 8), middle), ((8, 11), last)])
    # As layers give them: tokens before heads in memory.
    given = [
        torch.randn(tokens, count, width, dtype=torch.float64).transpose(0, 1).requires_grad_()
        for count, width in ((heads, 5), (asked, 5), (asked, 7))
    ]
    weight_THV = torch.randn(tokens, heads, 7, dtype=torch.float64)
    ours_THV = attend(*given, strips, 0.3)
    query, key, value = given
    theirs_HTV = functional.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask_TT, scale=0.3, enable_gqa=True
    )[0]
    torch.testing.assert_close(ours_THV, theirs_HTV.transpose(0, 1), rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad((theirs_HTV.transpose(0, 1) * weight_THV).sum(), given)
    found = torch.autograd.grad((ours_THV * weight_THV).sum(), given)
    for name, ours, theirs in zip("qkv", found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11, msg=lambda said, name=name: f"{name}: {said}")
    assert torch.autograd.gradcheck(lambda *x: attend(*x, strips, 0.3), given)


def test_a_hidden_key_gets_no_gradient() -> None:
    mask_TT = torch.zeros(4, 4, dtype=torch.float64)
    mask_TT[:, 2] = HIDDEN
    query, key, value = (torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    attend(query, key, value, strips_of(mask_TT, [((0, 4), ((0, 4),))]), 1.0).square().sum().backward()
    assert key.grad is not None and value.grad is not None
    assert not key.grad[:, 2].any() and not value.grad[:, 2].any()
    assert key.grad[:, 1].any() and value.grad[:, 1].any()
