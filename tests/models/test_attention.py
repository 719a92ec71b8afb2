"""The kernel of the language model alone changes, and comes back; nothing of it is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ConvNextConfig, LlamaConfig

from mmtune.errors import CapabilityError
from mmtune.models.attention import FLEX, attention_by, is_flex, text_attention, use_text_attention
from mmtune.models.composite.config import CompositeConfig
from mmtune.models.composite.model import CompositeForConditionalGeneration
from mmtune.models.load import load_model


def test_towers_keep_theirs(tiny_vlm: Path, tmp_path: Path) -> None:
    model: Any = load_model(str(tiny_vlm), attn=FLEX)
    assert text_attention(model) == "sdpa", "rows run by what transformers chooses"
    with attention_by(model, FLEX):
        assert is_flex(model) and model.config.vision_config._attn_implementation == "sdpa"
        model.save_pretrained(tmp_path)
    assert text_attention(model) == "sdpa"
    assert "flex" not in (tmp_path / "config.json").read_text()


def test_a_tower_without_the_kernel_keeps_its_own(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = CompositeConfig(
        vision_config=ConvNextConfig(num_stages=2, depths=[1, 1], hidden_sizes=[8, 16], image_size=32),
        text_config=LlamaConfig(**small, vocab_size=50),
        image_token_id=1,
        vision_feature_layer=None,
        vision_feature_select_strategy="full",
    )
    CompositeForConditionalGeneration(config).save_pretrained(tmp_path)
    for kernel in ("sdpa", "eager"):
        model: Any = load_model(str(tmp_path), attn=kernel)
        assert text_attention(model) == kernel and model.config.vision_config._attn_implementation == "eager"


def test_a_context_that_fails_puts_the_kernel_back(tiny_vlm: Path) -> None:
    model: Any = load_model(str(tiny_vlm))
    with pytest.raises(KeyError), attention_by(model, FLEX):
        raise KeyError
    assert text_attention(model) == "sdpa"


def test_rows_have_no_block_mask(tiny_vlm: Path) -> None:
    model: Any = load_model(str(tiny_vlm))
    use_text_attention(model, FLEX)
    with pytest.raises(TypeError, match="block mask"):
        model(input_ids=torch.tensor([[5, 6, 7]]))


def test_values_set_the_type() -> None:
    """Rotary positions of an fp32 residual make fp32 queries, where autocast makes bf16 values."""
    from types import SimpleNamespace

    import transformers.integrations.flex_attention as integration
    from torch.nn.attention.flex_attention import create_block_mask

    from mmtune.models.attention import _flex_attention

    mask = create_block_mask(lambda b, h, q, k: q >= k, 1, None, 128, 128, device="cpu")
    given: list[Any] = []

    def kernel(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        given.extend(tensors)
        return tensors[2]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integration, "compile_friendly_flex_attention", kernel)
        query, value = torch.zeros(1, 2, 128, 16), torch.zeros(1, 2, 128, 16, dtype=torch.bfloat16)
        _flex_attention(SimpleNamespace(training=True), query, query, value, mask, scaling=1.0)
    assert [tensor.dtype for tensor in given] == [torch.bfloat16] * 3


def test_a_kernel_that_is_not_installed(tiny_vlm: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a flash kernel may be here")
    with pytest.raises(CapabilityError, match="flash_attention_2"):
        load_model(str(tiny_vlm), attn="flash_attention_2")
