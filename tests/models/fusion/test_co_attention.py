"""Co-attention is LXMERT's cross layer with copied weights, in values and in gradients."""

import pytest
import torch
from transformers import LxmertConfig
from transformers.models.lxmert.modeling_lxmert import LxmertXLayer

from mmtune.models.fusion.co_attention import CoAttention

ATTENTION = {"attention.query": "att.query", "attention.key": "att.key", "attention.value": "att.value"}
ATTENTION |= {"attention.output": "output.dense", "norm": "output.LayerNorm"}
STREAMS = {"text": "lang", "media": "visn"}


def parameters_of(ours: CoAttention, theirs: LxmertXLayer):
    """Pairs of modules: ours, theirs; LXMERT shares one cross-attention between its two directions."""
    pairs = []
    for stream, name in STREAMS.items():
        attention = ours.get_submodule(f"{stream}_attention")
        pairs += [(attention.get_submodule(a), theirs.visual_attention.get_submodule(b)) for a, b in ATTENTION.items()]
        feed = ours.get_submodule(f"{stream}_feed_forward")
        pairs += [
            (feed.inner, theirs.get_submodule(f"{name}_inter.dense")),
            (feed.outer, theirs.get_submodule(f"{name}_output.dense")),
            (feed.norm, theirs.get_submodule(f"{name}_output.LayerNorm")),
        ]
    return pairs


@pytest.fixture
def pair():
    torch.manual_seed(0)
    config = LxmertConfig(
        hidden_size=16,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    theirs = LxmertXLayer(config)
    ours = CoAttention(16, 16, 4)
    for mine, other in parameters_of(ours, theirs):
        mine.load_state_dict(other.state_dict())
    # tanh(20) is 1 in fp32: the block without its gate.
    torch.nn.init.constant_(ours.gate, 20.0)
    return ours, theirs


def inputs():
    generator = torch.Generator().manual_seed(1)
    text, media = torch.randn(2, 5, 16, generator=generator), torch.randn(2, 3, 16, generator=generator)
    text_valid = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    media_valid = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    return text.requires_grad_(), media.requires_grad_(), text_valid, media_valid


def additive(valid):
    return torch.zeros(valid.shape).masked_fill(~valid, torch.finfo(torch.float32).min)[:, None, None]


def without_self_attention(theirs, text, media, text_valid, media_valid):
    (text,), (media,) = theirs.cross_att(text, additive(text_valid), media, additive(media_valid))
    return theirs.output_fc(text, media)


def test_the_block_is_lxmerts_in_values_and_gradients(pair):
    ours, theirs = pair
    text, media, text_valid, media_valid = inputs()
    slopes = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    results, gradients = [], []
    for block in (
        lambda: ours(text, media, media_valid, text_valid),
        lambda: without_self_attention(theirs, text, media, text_valid, media_valid),
    ):
        text.grad = media.grad = None
        made = block()
        sum((part * slope).sum() for part, slope in zip(made, slopes, strict=True)).backward()
        results.append(made)
        gradients.append((text.grad, media.grad))
    for found, wanted in zip(results[0] + gradients[0], results[1] + gradients[1], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    shared = theirs.visual_attention
    for name, other in ATTENTION.items():
        both = sum(ours.get_submodule(f"{s}_attention").get_submodule(name).weight.grad for s in STREAMS)
        torch.testing.assert_close(both, shared.get_submodule(other).weight.grad, rtol=1e-5, atol=2e-5)
    for mine, other in parameters_of(ours, theirs):
        if other not in set(shared.modules()):
            torch.testing.assert_close(mine.weight.grad, other.weight.grad, rtol=1e-5, atol=2e-5)


def test_the_cross_part_alone_is_lxmerts(pair):
    ours, theirs = pair
    text, media, text_valid, media_valid = inputs()
    (wanted_text,), (wanted_media,) = theirs.cross_att(text, additive(text_valid), media, additive(media_valid))
    found_text, found_media = ours.cross(text, media, media_valid, text_valid)
    torch.testing.assert_close(found_text, wanted_text, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_media, wanted_media, rtol=1e-5, atol=1e-5)


def test_a_new_layer_leaves_the_text_as_it_is_and_its_gate_learns():
    ours = CoAttention(16, 12, 4, media_heads=3)
    text = torch.randn(2, 5, 16)
    made, media = ours(text, torch.randn(2, 3, 12))
    assert torch.equal(made, text) and media.shape == (2, 3, 12)
    made.square().sum().backward()
    assert ours.gate.grad.abs() > 0


def test_text_without_media_passes_unchanged(pair):
    ours, _ = pair
    text, media, text_valid, media_valid = inputs()
    media_valid[0] = False
    made, other = ours(text, media, media_valid, text_valid)
    assert torch.equal(made[0], text[0]) and not torch.equal(made[1], text[1])
    assert made.isfinite().all() and other.isfinite().all()
    each = media_valid[:, None].expand(-1, 5, -1)
    torch.testing.assert_close(ours(text, media, each, text_valid)[0], made)
