"""Which kernel trains packed trees: FlexAttention where it proves exact, else the model's own."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from mmtune.encoding.collate import Collator
from mmtune.encoding.tree import build_trees
from mmtune.errors import CapabilityError
from mmtune.models.attention import FLEX, is_flex, text_attention
from mmtune.models.mask_rules import mask_rules
from mmtune.models.rope_index import rope_index
from mmtune.records import Message, TextPart
from mmtune.training.tree_batch import TreeCollator
from mmtune.training.tree_blocks import BLOCK
from mmtune.training.tree_check import TreeCheck, check_trees
from mmtune.training.tree_kernels import kernels_to_try, prove

EXACT, WRONG = TreeCheck(True, 0.0, 0.0, 1e-4), TreeCheck(False, 0.5, 0.5, 1e-4, "loss differs")


@pytest.fixture
def model(tiny_family: Any) -> Any:
    return deepcopy(tiny_family("qwen2_vl").model)


def test_what_is_tried(model: Any) -> None:
    assert kernels_to_try(model, "auto", "cuda") == (FLEX, "sdpa")
    assert kernels_to_try(model, "auto", "cpu") == ("sdpa",)
    assert kernels_to_try(model, "sdpa", "cuda") == ("sdpa",)
    assert kernels_to_try(model, FLEX, "cuda") == (FLEX,)
    with pytest.raises(CapabilityError, match="no backward pass on a CPU"):
        kernels_to_try(model, FLEX, "cpu")


def test_a_model_with_attention_dropout(model: Any) -> None:
    model.config.get_text_config().attention_dropout = 0.1
    assert kernels_to_try(model, "auto", "cuda") == ("sdpa",)
    with pytest.raises(CapabilityError, match="attention dropout"):
        kernels_to_try(model, FLEX, "cuda")


def test_a_model_with_virtual_tokens(tiny_family: Any) -> None:
    from mmtune.models.method import with_method

    llava = deepcopy(tiny_family("llava").model)
    prompted = with_method(llava, "prompt", towers=["llm"], lora={}, virtual_tokens=5, base_path="")
    assert kernels_to_try(prompted, "auto", "cuda") == ("sdpa",)


def test_the_first_that_is_exact_stays(model: Any) -> None:
    towers = model.config.vision_config._attn_implementation
    proof = prove(model, (FLEX, "sdpa"), lambda: EXACT)
    assert proof.exact and proof.kernel == FLEX and not proof.refused and is_flex(model)
    assert model.config.vision_config._attn_implementation == towers == "sdpa"


def test_the_model_goes_on_with_its_own_kernel(model: Any) -> None:
    proof = prove(model, (FLEX, "sdpa"), lambda: WRONG if is_flex(model) else EXACT)
    assert proof.exact and proof.kernel == text_attention(model) == "sdpa"
    assert proof.refused == ("flex_attention: loss differs",)
    # Nothing is exact: rows train apart, by the model's own kernel.
    proof = prove(model, (FLEX,), lambda: WRONG)
    assert not proof.exact and proof.kernel == text_attention(model) == "sdpa" and not proof.refused


def test_one_process_that_refuses_is_enough(model: Any) -> None:
    proof = prove(model, (FLEX, "sdpa"), lambda: EXACT, agree=lambda exact: not is_flex(model))
    assert proof.kernel == "sdpa" and proof.refused == ("flex_attention: another process refused it",)


@pytest.mark.parametrize("kernel_works", [True, False])
def test_on_real_trees(tiny_family: Any, media: Any, served: Any, request: Any, kernel_works: bool) -> None:
    """The whole way, with the kernel stood in for and without: PyTorch's own has no backward pass on a CPU."""
    if kernel_works:
        request.getfixturevalue("flex_by_hand")
    family = tiny_family("qwen2_vl")
    model = deepcopy(family.model)
    medium, real = media.image(60, 90)
    served[medium.path] = real["image"]
    rows = [
        family.renderer.encode([Message("user", (medium, TextPart(q))), Message("assistant", (TextPart("yes"),))])
        for q in ("Is it red?", "Is the cat on the left?")
    ]
    trees = list(build_trees(rows, ["a", "b"], 4096))

    def check() -> TreeCheck:
        windows = tuple(mask_rules(model).windows.values()) if is_flex(model) else ()
        collate = Collator(family.processor, media_root=Path())
        return check_trees(model, trees, TreeCollator(collate, rope_index(model), BLOCK, windows), rows_by="sdpa")

    proof = prove(model, (FLEX, "sdpa"), check)
    assert proof.exact and proof.kernel == text_attention(model) == (FLEX if kernel_works else "sdpa")
    assert bool(proof.refused) is not kernel_works
