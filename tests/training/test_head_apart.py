"""The head runs apart from models that hand on its logits as they are, and from no other."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from mmtune.models.adapter import add_lora
from mmtune.models.attention import FLEX, text_attention, use_text_attention
from mmtune.models.head_apart import head_to_run_apart, left_out
from mmtune.training import cross_entropy
from mmtune.training.loss import answer_loss
from tests.training.test_label_tokens import batch_of

SIZES: dict[str, Any] = {
    "vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0,
}  # fmt: skip


def test_families_hand_on_what_the_head_makes(
    family_name: str, tiny_family: Any, media: Any, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = tiny_family(family_name)
    model, batch = family.model, batch_of(family, media, served)
    whole = answer_loss(model, batch)[0]
    drawn = torch.get_rng_state()
    head = head_to_run_apart(model)
    mixed = len(getattr(model.config, "branches", ())) > 1
    assert head is (None if mixed else model.get_output_embeddings())
    assert torch.equal(torch.get_rng_state(), drawn), "training draws on"
    assert "forward" not in vars(model.get_output_embeddings()), "the head is as it was"
    monkeypatch.setattr(cross_entropy, "_MOST_LOGITS", 2 * model.config.get_text_config().vocab_size)
    torch.testing.assert_close(answer_loss(model, batch)[0], whole)


@pytest.mark.parametrize(
    "model",
    [
        Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=30.0)),
        GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    ],
    ids=["capped", "scaled"],
)
def test_a_head_whose_logits_are_shaped_stays_inside(model: Any) -> None:
    assert head_to_run_apart(model) is None


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_where_trees_train_by_flex_attention(name: str, tiny_family: Any) -> None:
    model = add_lora(deepcopy(tiny_family(name).model), towers=("llm",), targets=None, r=2, alpha=4)
    use_text_attention(model, FLEX)
    assert head_to_run_apart(model) is model.get_output_embeddings()
    assert text_attention(model) == FLEX


def test_a_forward_of_its_own_comes_back() -> None:
    head = torch.nn.Linear(3, 5)
    own = lambda x: x * 2  # noqa: E731
    head.forward = own  # type: ignore[method-assign]
    with left_out(head) as given:
        assert head(torch.ones(1, 2, 3)).shape == (1, 2, 3)
    assert given[0].shape == (1, 2, 3)
    assert head.forward is own
