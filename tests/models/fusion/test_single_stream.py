"""The single stream of `attention: self` is BERT over inputs_embeds with copied weights, on the model that trains."""

import pytest
import torch
from transformers import BertConfig, BertModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmtune.models.composite.config import CompositeConfig
from mmtune.models.composite.masks import both_ways
from mmtune.models.composite.model import CompositeModel
from mmtune.models.encoders import PatchesConfig
from mmtune.models.fusion.single_stream import SegmentEmbedding

IMAGE = 9
IDS = torch.tensor([[IMAGE, IMAGE, IMAGE, 3, 4, 5, 6, 7], [3, IMAGE, IMAGE, 4, 5, 0, 0, 0]])
VALID = torch.tensor([[1] * 8, [1, 1, 1, 1, 1, 0, 0, 0]], dtype=torch.bool)
# MMBT shares the position table between modalities, so each counts from 0.
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 0, 1, 1, 2, 3, 4, 5]])


@pytest.fixture(params=["sdpa", "eager"])
def pair(request):
    """The composite model around a BERT, and the BERT itself; segments of the one are token types of the other."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=10,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=12,
        type_vocab_size=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    theirs = BertModel(config, add_pooling_layer=False)
    ours = CompositeModel(
        CompositeConfig(
            text_config={**config.to_dict(), "is_decoder": True},
            vision_config=PatchesConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2).to_dict(),
            image_token_id=IMAGE,
            fusion={"attention": "self"},
            attn_implementation=request.param,
        )
    )
    ours.language_model.load_state_dict(theirs.state_dict(), strict=False)
    types = theirs.embeddings.token_type_embeddings.weight
    with torch.no_grad():
        ours.language_model.embeddings.token_type_embeddings.weight.zero_()
        ours.segments.weight.copy_(types[: len(ours.segments.weight)])
    return ours.train(), theirs.train()


def test_values_and_gradients_are_berts(pair):
    ours, theirs = pair
    features = torch.randn(5, 16)
    mine, other = features.clone().requires_grad_(), features.clone().requires_grad_()
    images = {"image": BaseModelOutputWithPooling(pooler_output=list(mine.split([3, 2])))}
    found = ours(
        input_ids=IDS,
        attention_mask=VALID.long(),
        position_ids=POSITIONS,
        mm_encoder_outputs=images,
        use_cache=False,
    ).last_hidden_state
    words = theirs.embeddings.word_embeddings(IDS)
    embeds = words.masked_scatter((IDS == IMAGE)[..., None], other)
    wanted = theirs(
        inputs_embeds=embeds,
        token_type_ids=(IDS == IMAGE).long(),
        position_ids=POSITIONS,
        attention_mask=VALID.long(),
    ).last_hidden_state
    torch.testing.assert_close(found[VALID], wanted[VALID], rtol=1e-5, atol=1e-5)
    slope = torch.randn_like(found) * VALID[..., None]
    (found * slope).sum().backward()
    (wanted * slope).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-5)
    own = dict(ours.language_model.named_parameters())
    for name, parameter in theirs.named_parameters():
        if "token_type" not in name:
            torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-5, atol=2e-5)
    types = theirs.embeddings.token_type_embeddings.weight.grad
    torch.testing.assert_close(ours.segments.weight.grad[:2], types[:2], rtol=1e-5, atol=2e-5)


def test_segments_start_as_nothing_and_learn():
    segment = SegmentEmbedding(2, 4)
    made = segment(torch.tensor([[0, 1, 1]]))
    assert torch.equal(made, torch.zeros(1, 3, 4))
    made.sum().backward()
    assert segment.weight.grad[:, 0].tolist() == [1.0, 2.0]


def test_the_prompt_sees_itself_whole_and_the_answer_stays_causal():
    causal = torch.ones(5, 5).tril().bool()
    prompt = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 0, 0]], dtype=torch.bool)
    valid = torch.tensor([[1] * 5, [0, 1, 1, 1, 1]], dtype=torch.bool)
    mask = both_ways(valid.long(), prompt, valid, "sdpa", torch.float32)
    assert mask.shape == (2, 1, 5, 5)
    assert mask[0, 0, :3, :3].all() and not mask[0, 0, :3, 3:].any()
    assert torch.equal(mask[0, 0, 3:], causal[3:])
    assert mask[1, 0, 1, 2] and not mask[1, 0, 1:, 0].any()
