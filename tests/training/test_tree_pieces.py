"""Attention of packed trees in pieces: nothing that is seen is left out, and numbers are those of the whole mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM

from mmtune.models import segments
from mmtune.models.segments import Piece, without_pieces
from mmtune.models.strips import Strip
from mmtune.training import tree_pieces
from mmtune.training.tree_mask import MaskRules, attention_mask, dense_mask
from mmtune.training.tree_pieces import pieces_of
from tests.training.forests import WORD, forests, layout_of

RULES = MaskRules("sdpa", {"full_attention": None}, torch.float32)


@settings(max_examples=200, deadline=None)
@given(forest=forests(), worth=st.sampled_from([1, 8, 40]))
def test_every_token_asks_once_and_all_that_it_sees_is_there(forest: Any, worth: int) -> None:
    layout = layout_of(forest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_pieces, "_WORTH", worth)
        found = pieces_of(layout.numpy())
    seen_BTT = dense_mask(layout, None)[:, 0].numpy()
    for seen_TT, own in zip(seen_BTT, found, strict=bool(found)):
        assert [piece.queries[0] for piece in own] == [0, *(piece.queries[1] for piece in own[:-1])]
        assert own[-1].queries[1] == len(seen_TT)
        for piece in own:
            asked = seen_TT[slice(*piece.queries)]
            reach = np.zeros(len(seen_TT), dtype=bool)
            for first, end in piece.keys:
                assert not reach[first:end].any(), "a key twice"
                reach[first:end] = True
            assert not asked[:, ~reach].any()
            if piece.causal:
                assert np.array_equal(asked[:, reach], np.tri(len(asked), dtype=bool))


def words(*lengths: int) -> list[list[int]]:
    return [[WORD] * length for length in lengths]


def test_where_a_row_is_cut() -> None:
    layout = layout_of([[words(200, 30, 40), words(0, 20), words(0, 20), words(10, 150)]])
    (own,) = pieces_of(layout.numpy())
    assert own == (
        Piece((0, 200), ((0, 200),), causal=True),
        Piece((200, 270), ((0, 270),)),
        Piece((270, 310), ((270, 310),)),
        # Two tokens of padding stand at the end, with their short neighbour.
        Piece((310, 472), ((310, 472),)),
    )


def test_many_branches_are_asked_in_groups() -> None:
    layout = layout_of([[words(100, *([50] * 40))]])
    (own,) = pieces_of(layout.numpy())
    assert own[0] == Piece((0, 100), ((0, 100),), causal=True)
    assert own[1] == Piece((100, 200), ((0, 200),))
    assert own[2] == Piece((200, 300), ((0, 100), (200, 300)))
    assert sum(piece.products for piece in own) < layout.shape[2] ** 2 / 8


def test_small_rows_and_virtual_tokens_stay_whole() -> None:
    assert pieces_of(layout_of([[words(60, 10)]]).numpy()) == ()
    layout = layout_of([[words(300, 200)]]).numpy()
    assert pieces_of(layout)
    layout[0, 0, :4] = -2
    assert pieces_of(layout) == ()


class Products(TorchFunctionMode):
    """Counts the products of a query and a key in PyTorch's attention and in strips."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.by_torch = self.in_strips = 0
        attend = segments.attend

        def counted(query: Any, key: Any, value: Any, strips: tuple[Strip, ...], scaling: float) -> torch.Tensor:
            self.in_strips += sum(strip.mask_QK.numel() for strip in strips)
            return attend(query, key, value, strips, scaling)

        patch.setattr(segments, "attend", counted)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            self.by_torch += args[0].shape[0] * args[0].shape[2] * args[1].shape[2]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_the_whole_mask(
    checkpointing: bool, kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grouped heads, two rows, a row of short trees, and blocks computed again in the backward pass."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    monkeypatch.setattr(segments, "_KEPT_BYTES", kept_bytes)
    model = LlamaForCausalLM(config).double().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    layout = layout_of([[words(150, 90, 90, 90)], [words(0, 90), words(0, 20), words(30, 120)]])
    ids = torch.randint(50, layout.shape[1:])
    mask = attention_mask({"layout": layout}, MaskRules("sdpa", RULES.windows, torch.float64))
    found = []
    for given_mask in (mask, without_pieces(mask)):
        model.zero_grad()
        with Products(monkeypatch) as products:
            made = model(ids, attention_mask=given_mask, position_ids=layout[2].long(), use_cache=False).logits
        counted = products.in_strips, products.by_torch
        made.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        found.append((counted, made.detach(), gradients))
    ((in_strips, by_torch), ours, our_grads), ((_, all_pairs), theirs, their_grads) = found
    fewer, other = (in_strips, by_torch) if kept_bytes else (by_torch, in_strips)
    assert 0 < fewer < 0.75 * all_pairs
    assert other == 0
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for name, grad in our_grads.items():
        torch.testing.assert_close(grad, their_grads[name], rtol=1e-9, atol=1e-9)
