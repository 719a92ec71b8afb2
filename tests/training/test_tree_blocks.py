"""The spans against the dense mask, and the block mask against PyTorch's own from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.training.tree_blocks import BLOCK, block_mask, flex_parts, seen_spans, sees_spans
from mmtune.training.tree_mask import dense_mask
from tests.training.forests import IMAGE, WORD, forests, layout_of


@settings(max_examples=150, deadline=None)
@given(forest=forests(), window=st.none() | st.integers(1, 6))
def test_spans_say_what_the_rule_says(forest: Any, window: int | None) -> None:
    layout = layout_of(forest)
    spans = torch.from_numpy(seen_spans(layout.numpy(), window))
    at = torch.arange(layout.shape[2])
    row = torch.arange(layout.shape[1])[:, None, None]
    found = sees_spans(spans)(row, row, at[:, None], at)
    assert torch.equal(found, dense_mask(layout, window)[:, 0])


def long_forest(seed: int) -> list[list[list[list[int]]]]:
    """Two rows of about 600 tokens, whose pieces are sometimes longer than two blocks."""
    draw = np.random.default_rng(seed)

    def piece(most: int) -> list[int]:
        image = [WORD, *[IMAGE] * int(draw.integers(0, most)), WORD]
        return image + [WORD] * int(draw.integers(0, most))

    return [
        [[piece(200), *(piece(60) for _ in range(draw.integers(1, 4)))] for _ in range(draw.integers(1, 4))]
        for _ in range(2)
    ]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("window", [None, 1, 90, 300])
def test_the_block_mask_is_pytorchs_own(seed: int, window: int | None) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    layout = layout_of(long_forest(seed), BLOCK)
    _, rows, length = layout.shape
    seen_BTT = dense_mask(layout, window)[:, 0]
    expected = create_block_mask(lambda b, h, q, k: seen_BTT[b, q, k], rows, None, length, length, device="cpu")
    parts = flex_parts(layout.numpy(), (None, window))
    found = block_mask(parts["spans"][1], parts["tiles"][1])
    assert found.shape == expected.shape
    assert (parts["tiles"] == 2).any(), "no block is seen whole: the case says little"
    for mine, theirs in zip(found.as_tuple()[:-1], expected.as_tuple()[:-1], strict=True):
        if isinstance(theirs, torch.Tensor):
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
        else:
            assert mine == theirs


def test_new_masks_and_lengths_do_not_compile_again_and_again() -> None:
    """One compilation for the first length, one for any length: what a GPU would compile, counted on a CPU."""
    from torch._dynamo.testing import CompileCounter
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    counter = CompileCounter()

    def run(query: torch.Tensor, mask: Any) -> torch.Tensor:
        return flex_attention(query, query, query, block_mask=mask)

    compiled = torch.compile(run, backend=counter)
    for seed in range(6):
        layout = layout_of(long_forest(seed), BLOCK)
        parts = flex_parts(layout.numpy(), (None,))
        compiled(torch.zeros(2, 1, layout.shape[2], 16), block_mask(parts["spans"][0], parts["tiles"][0]))
    assert counter.frame_count <= 2
    torch._dynamo.reset()
