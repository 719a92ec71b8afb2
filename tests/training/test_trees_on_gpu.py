"""On a GPU packed trees have the loss and the gradients of separate rows, by PyTorch's own kernels."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtune.encoding.collate import Collator
from mmtune.models.attention import FLEX, use_text_attention
from mmtune.models.mask_rules import mask_rules
from mmtune.models.rope_index import rope_index
from mmtune.training.tree_batch import TreeCollator
from mmtune.training.tree_blocks import BLOCK
from mmtune.training.tree_check import check_trees
from tests.gpu import needs_gpu
from tests.training.test_tree_batch import READ_THE_MASK, trees_of

pytestmark = needs_gpu


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Within a test fp32 means fp32: no TF32 in products and convolutions."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def checked(name: str, wide_family: Any, media: Any, served: Any, kernel: str, dtype: torch.dtype) -> Any:
    """Returns the check of training's start, of a tiny model of a family on the GPU."""
    family = wide_family(name)
    model = deepcopy(family.model).to("cuda", dtype)
    use_text_attention(model, kernel)
    flex = kernel == FLEX
    windows = tuple(mask_rules(model).windows.values()) if flex else ()
    collate = TreeCollator(
        Collator(family.processor, media_root=Path()), rope_index(model), BLOCK if flex else 1, windows
    )
    return check_trees(model, trees_of(family, media, served), collate, device="cuda", rows_by="sdpa")


@pytest.mark.parametrize("kernel", ["sdpa", FLEX])
def test_in_fp32(family_name: str, kernel: str, wide_family: Any, media: Any, served: Any) -> None:
    found = checked(family_name, wide_family, media, served, kernel, torch.float32)
    if kernel == FLEX and family_name in READ_THE_MASK:
        assert not found.exact and "cannot read FlexAttention's masks" in found.reason
        return
    assert found.exact and found.loss_error < 1e-5 and found.gradient_error < 1e-5, found


@pytest.mark.parametrize("kernel", ["sdpa", FLEX])
@pytest.mark.parametrize("name", ["text_qwen3", "llava", "qwen2_5_vl", "gemma3", "composite"])
def test_in_bf16(name: str, kernel: str, wide_family: Any, media: Any, served: Any) -> None:
    """As exact as rows that are padded together are against rows one at a time, or a few times that."""
    found = checked(name, wide_family, media, served, kernel, torch.bfloat16)
    assert found.exact, found
