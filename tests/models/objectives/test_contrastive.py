"""The contrastive loss is CLIP's own, in value and gradient; twins are no negatives."""

import math

import torch
from transformers import CLIPConfig, CLIPModel

from mmtune.models.objectives.contrastive import Temperature, contrastive_loss


def test_the_loss_of_a_clip_model_and_its_gradients():
    torch.manual_seed(0)
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tiny, "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 2},
        vision_config={**tiny, "image_size": 8, "patch_size": 4},
        projection_dim=6,
    )
    model = CLIPModel(config).eval()
    inputs = {"input_ids": torch.randint(3, 20, (4, 5)), "pixel_values": torch.randn(4, 3, 8, 8)}
    wanted = model(**inputs, return_loss=True)
    images, texts = wanted.image_embeds.detach(), wanted.text_embeds.detach()
    temperature = Temperature()
    torch.nn.init.constant_(temperature.logit_scale, model.logit_scale.item())
    # The vectors before they are normalised would do as well: cosines have no length.
    found = contrastive_loss(3.0 * images, texts, temperature())
    torch.testing.assert_close(found, wanted.loss, rtol=1e-5, atol=1e-6)
    (ours,) = torch.autograd.grad(found, temperature.logit_scale)
    (theirs,) = torch.autograd.grad(wanted.loss, model.logit_scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_twins_are_not_each_others_negatives():
    one, other = torch.randn(4, 8), torch.randn(4, 8)
    # Rows 0 and 1 share a picture, 1 and 2 a text: 0 and 2 are negatives all the same.
    same = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]).bool()
    cosines = 5 * torch.nn.functional.normalize(one, dim=-1) @ torch.nn.functional.normalize(other, dim=-1).T
    wanted = 0.0
    for table in (cosines, cosines.T):
        for i in range(4):
            others = [table[i, j] for j in range(4) if not same[i, j]]
            wanted -= (table[i, i] - torch.logsumexp(torch.stack([table[i, i], *others]), 0)) / 8
    torch.testing.assert_close(contrastive_loss(one, other, 5.0, same), wanted)
    assert contrastive_loss(one, other, 5.0, torch.ones(4, 4).bool()).item() == 0.0


def test_the_temperature_starts_at_clips_and_stays_bounded():
    temperature = Temperature()
    assert temperature().item() == torch.tensor(math.log(1 / 0.07)).exp().item()
    torch.nn.init.constant_(temperature.logit_scale, 9.0)
    assert temperature().item() == 100.0
