"""The single stream is BERT over inputs_embeds with copied weights; the prefix mask opens the prefix alone."""

import pytest
import torch
from transformers import BertConfig, BertModel

from mmtune.models.fusion.single_stream import SegmentEmbedding, SingleStream, prefix_mask

NAMES = {
    "attention.attention.query": "attention.self.query",
    "attention.attention.key": "attention.self.key",
    "attention.attention.value": "attention.self.value",
    "attention.attention.output": "attention.output.dense",
    "attention.norm": "attention.output.LayerNorm",
    "feed_forward.inner": "intermediate.dense",
    "feed_forward.outer": "output.dense",
    "feed_forward.norm": "output.LayerNorm",
}


def module_pairs(ours, theirs):
    pairs = [
        (ours.segment, theirs.embeddings.token_type_embeddings),
        (ours.position, theirs.embeddings.position_embeddings),
        (ours.norm, theirs.embeddings.LayerNorm),
    ]
    for mine, other in zip(ours.layers, theirs.encoder.layer, strict=True):
        pairs += [(mine.get_submodule(a), other.get_submodule(b)) for a, b in NAMES.items()]
    return pairs


@pytest.fixture
def pair():
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
    config._attn_implementation = "eager"
    theirs = BertModel(config, add_pooling_layer=False)
    ours = SingleStream(16, layers=2, heads=4, segments=3, positions=12, inner_width=32)
    for mine, other in module_pairs(ours, theirs):
        mine.load_state_dict(other.state_dict())
    return ours, theirs


def test_values_and_gradients_are_berts(pair):
    ours, theirs = pair
    # Three media tokens, then text: each modality counts its positions from 0.
    embeddings = torch.randn(2, 8, 16)
    segments = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]] * 2)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * 2)
    valid = torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 1, 0, 0]], dtype=torch.bool)
    mine, other = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
    found = ours(mine, segments, positions, valid)
    wanted = theirs(
        inputs_embeds=other, token_type_ids=segments, position_ids=positions, attention_mask=valid.long()
    ).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    slope = torch.randn_like(found) * valid[..., None]
    (found * slope).sum().backward()
    (wanted * slope).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-5)
    for a, b in module_pairs(ours, theirs):
        torch.testing.assert_close(a.weight.grad, b.weight.grad, rtol=1e-5, atol=2e-5)
    assert mine.grad[1, :3].abs().max() == 0


def test_segments_start_as_nothing_and_learn():
    segment = SegmentEmbedding(2, 4)
    made = segment(torch.tensor([[0, 1, 1]]))
    assert torch.equal(made, torch.zeros(1, 3, 4))
    made.sum().backward()
    assert segment.weight.grad[:, 0].tolist() == [1.0, 2.0]


def test_the_prefix_sees_itself_whole_and_the_answer_stays_causal():
    causal = torch.ones(5, 5).tril().bool()[None, None]
    prefix = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 0, 0]], dtype=torch.bool)
    valid = torch.tensor([[1] * 5, [0, 1, 1, 1, 1]], dtype=torch.bool)
    mask = prefix_mask(causal, prefix, valid)
    assert mask.shape == (2, 1, 5, 5)
    assert mask[0, 0, :3, :3].all() and not mask[0, 0, :3, 3:].any()
    assert torch.equal(mask[0, 0, 3:], causal[0, 0, 3:])
    assert mask[1, 0, 1, 2] and not mask[1, 0, 0, 1:].any()
