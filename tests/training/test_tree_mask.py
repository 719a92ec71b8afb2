"""The dense mask against its definition in words, written as a loop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.errors import CapabilityError
from mmtune.models.mask_rules import MaskRules, mask_rules
from mmtune.training import tree_mask
from mmtune.training.tree_mask import attention_mask, dense_mask
from tests.training.forests import IMAGE, forests, layout_of


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


@pytest.mark.parametrize("queries", [1, 3, 7])
def test_the_mask_is_the_same_in_pieces(queries: int, monkeypatch: Any) -> None:
    layout = layout_of([[[[0, 1, 1, 0], [0, 0], [0, 1, 0]]], [[[], [0, 0, 0]]]])
    whole = dense_mask(layout, 4)
    monkeypatch.setattr(tree_mask, "_QUERIES", queries)
    assert torch.equal(dense_mask(layout, 4), whole)


def test_one_mask_per_kind_of_layer() -> None:
    layout = layout_of([[[[0, 0], [0, 0], [0, 0]]]])
    rules = MaskRules("eager", {"full_attention": None, "sliding_attention": 2}, torch.float32)
    masks = attention_mask({"layout": layout}, rules)
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
