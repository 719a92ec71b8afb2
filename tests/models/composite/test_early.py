"""Early fusion is LLaVA's, by transformers' own class with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mmtune.models.composite.config import CompositeConfig
from mmtune.models.composite.model import CompositeForConditionalGeneration

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
IMAGE = 3


def pair(tie: bool = False) -> tuple[Any, Any]:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**SMALL, image_size=28, patch_size=7)
    text = LlamaConfig(**SMALL, vocab_size=50, num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=tie)
    llava = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE))
    with torch.no_grad():
        for parameter in llava.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    own = CompositeForConditionalGeneration(
        CompositeConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_id=IMAGE)
    )
    own.load_state_dict(llava.state_dict())
    return llava.eval(), own.eval()


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(4, 50, (2, 40))
    ids[0, 2:18] = IMAGE
    ids[0, 20:36] = IMAGE
    ids[1, 5:21] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    labels = torch.where((torch.arange(40) > 36) | ((torch.arange(40) > 24) & (torch.arange(40) < 30)), ids, -100)
    labels[ids == IMAGE] = -100
    labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": torch.randn(3, 3, 28, 28)}


@pytest.mark.parametrize("tie", [False, True])
def test_logits_and_gradients_are_those_of_llava(tie: bool) -> None:
    llava, own = pair(tie)
    given = batch()
    expected, found = llava(**given), own(**given)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss)
    expected.loss.backward()
    found.loss.backward()
    wanted = {name: p.grad for name, p in llava.named_parameters() if p.grad is not None}
    made = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
    assert made.keys() == wanted.keys() and len(made) > 50
    for name, gradient in wanted.items():
        torch.testing.assert_close(made[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_features_in_place_of_pixels() -> None:
    _, own = pair()
    given = batch()
    expected = own(**given).logits
    made = own.get_image_features(given.pop("pixel_values"))
    assert torch.equal(own(**given, mm_encoder_outputs={"image": made}).logits, expected)


def test_generates_as_llava_and_with_its_cache() -> None:
    llava, own = pair()
    given = batch()
    del given["labels"]
    # Padding stands on the left when a model goes on writing.
    given["input_ids"][1] = given["input_ids"][1].roll(10)
    given["attention_mask"][1] = given["attention_mask"][1].roll(10)
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = llava.generate(**given, **asked)
    assert torch.equal(own.generate(**given, **asked), expected)
    assert torch.equal(own.generate(**given, **asked, use_cache=False), expected)
    beams = {**asked, "num_beams": 3}
    assert torch.equal(own.generate(**given, **beams), llava.generate(**given, **beams))


@pytest.mark.parametrize("tie", [False, True])
def test_saved_and_loaded_by_the_auto_classes(tmp_path: Any, tie: bool) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    from mmtune.models.composite import register

    register()
    _, own = pair(tie)
    own.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, CompositeConfig) and config.projectors == {"image": {"kind": "mlp"}}
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    given = batch()
    assert torch.equal(again(**given).logits, own(**given).logits)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tie


def test_wrong_numbers_of_features_are_refused() -> None:
    _, own = pair()
    given = batch()
    with pytest.raises(ValueError, match="48 image tokens and 32 image features"):
        own(**{**given, "pixel_values": given["pixel_values"][:2]})
