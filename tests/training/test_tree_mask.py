"""The mask against its definition in words, written as a loop; and all its forms alike."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.encoding.tree import Tree
from mmtune.errors import CapabilityError
from mmtune.training.tree_batch import packed_layout
from mmtune.training.tree_mask import MaskRules, attention_mask, block_mask, dense_mask, mask_rules

IMAGE, WORD = 1, 0


@st.composite
def forests(draw: Any) -> list[list[list[list[int]]]]:
    """Rows of trees; a tree is its prefix and its branches, each a list of token types."""
    types = st.lists(st.sampled_from([WORD, WORD, IMAGE]), min_size=1, max_size=5)

    def tree() -> list[list[int]]:
        prefix = [*draw(types), WORD] if draw(st.booleans()) else []
        # Structure stands around every image, so a branch begins and ends with a word.
        return [prefix, *([WORD, *draw(types), WORD] for _ in range(draw(st.integers(1, 3))))]

    return [[tree() for _ in range(draw(st.integers(1, 3)))] for _ in range(draw(st.integers(1, 2)))]


def brute_force(forest: list[list[list[list[int]]]], length: int, window: int | None) -> np.ndarray:
    """Every path is written out as the separate row it stands for, and masked there."""
    seen = np.zeros((len(forest), length, length), dtype=bool)
    for row, trees in enumerate(forest):
        start = 0
        for prefix, *branches in trees:
            own = start + len(prefix)
            for branch in branches:
                path = [*range(start, start + len(prefix)), *range(own, own + len(branch))]
                types = [*prefix, *branch]
                for q in range(len(path)):
                    for k in range(len(path)):
                        between = types[min(q, k) : max(q, k) + 1]
                        allowed = k <= q or all(kind == IMAGE for kind in between)
                        if window is not None:
                            allowed = allowed and k > q - window
                        seen[row, path[q], path[k]] |= allowed
                own += len(branch)
            start = own
    return seen


def layout_of(forest: list[list[list[list[int]]]]) -> torch.Tensor:
    def tree(parts: list[list[int]]) -> Tree:
        branch = np.repeat(np.arange(len(parts)), [len(part) for part in parts]).astype(np.int32)
        names = tuple(str(number) for number in range(len(parts) - 1))
        return Tree(np.zeros_like(branch), np.full_like(branch, -100), branch, (), names, (1.0,) * len(names))

    bins = [[tree(parts) for parts in trees] for trees in forest]
    length = max(sum(item.input_ids.size for item in trees) for trees in bins) + 2
    types = np.zeros((len(bins), length), dtype=np.int64)
    for row, trees in enumerate(forest):
        flat = [kind for parts in trees for part in parts for kind in part]
        types[row, : len(flat)] = flat
    return torch.from_numpy(packed_layout(bins, length, types))


@settings(max_examples=150, deadline=None)
@given(forest=forests(), window=st.none() | st.integers(1, 6))
def test_the_mask_is_its_definition(forest: Any, window: int | None) -> None:
    layout = layout_of(forest)
    found = dense_mask(layout, window)
    real = layout[0] >= 0
    expected = torch.from_numpy(brute_force(forest, layout.shape[2], window))
    assert torch.equal(found[:, 0] & real[:, None, :] & real[:, :, None], expected)
    assert found.any(dim=-1).all(), "a row without any key would be NaN"
    assert not (found[:, 0] & (real[:, None, :] ^ real[:, :, None])).any()


@settings(max_examples=10, deadline=None)
@given(forest=forests(), window=st.none() | st.integers(1, 6))
def test_the_block_mask_is_the_dense_one(forest: Any, window: int | None) -> None:
    from torch.nn.attention.flex_attention import create_mask

    layout = layout_of(forest)
    blocks = block_mask(layout, window)
    rows, length = layout.shape[1:]
    same = create_mask(blocks.mask_mod, rows, None, length, length, device="cpu")
    assert torch.equal(same, dense_mask(layout, window))
    assert blocks.shape == (rows, 1, length, length)


def test_one_mask_per_kind_of_layer() -> None:
    layout = layout_of([[[[0, 0], [0, 0], [0, 0]]]])
    rules = MaskRules("eager", {"full_attention": None, "sliding_attention": 2}, torch.float32)
    masks = attention_mask(layout, rules)
    assert set(masks) == {"full_attention", "sliding_attention"}
    assert (masks["full_attention"] == 0).sum() > (masks["sliding_attention"] == 0).sum()
    assert torch.equal(masks["full_attention"] == 0, dense_mask(layout, None))


def rules_of(**text: Any) -> MaskRules:
    config = SimpleNamespace(**{"_attn_implementation": "sdpa", **text})
    return mask_rules(SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config), dtype=torch.float32))


def test_rules_of_models() -> None:
    assert rules_of().windows == {"full_attention": None}
    assert rules_of(sliding_window=7).windows == {"sliding_attention": 7}
    assert rules_of(sliding_window=7, layer_types=["full_attention"]).windows == {"full_attention": None}


@pytest.mark.parametrize(
    "text", [{"layer_types": ["full_attention", "linear_attention"]}, {"_attn_implementation": "flash_attention_2"}]
)
def test_models_without_trees_are_refused(text: dict[str, Any]) -> None:
    with pytest.raises(CapabilityError):
        rules_of(**text)
