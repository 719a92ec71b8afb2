"""Tower layers that nothing reads are not computed, and the features are the same bits."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers as t

from mmtune.models.unused_layers import skip_unused_layers

TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip


def llava(layer: Any, vision: Any = t.CLIPVisionConfig) -> Any:
    torch.manual_seed(0)
    config = t.LlavaConfig(
        vision_config=vision(**VISION), text_config=t.LlamaConfig(**TEXT), image_token_id=3,
        vision_feature_layer=layer, vision_feature_select_strategy="full",
    )  # fmt: skip
    return t.LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize(("layer", "skipped"), [(-2, 1), (-1, 0), (2, 2), ([-3, 1], 2)])
@pytest.mark.parametrize("vision", [t.CLIPVisionConfig, t.SiglipVisionConfig])
def test_the_features_stay_and_the_layers_rest(layer: Any, skipped: int, vision: Any) -> None:
    model = llava(layer, vision)
    pixels = torch.randn(2, 3, 28, 28)
    expected = model.get_image_features(pixels, return_dict=True).pooler_output
    ours = deepcopy(model)
    assert skip_unused_layers(ours) == skipped
    ran: list[int] = []
    for name, module in ours.named_modules():
        if name.endswith("encoder.layers") and isinstance(module, torch.nn.ModuleList):
            for number, block in enumerate(module):
                block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    found = ours.get_image_features(pixels, return_dict=True).pooler_output
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert ran == list(range(4 - skipped))
