"""The gated layer is IDEFICS's with copied weights, and the identity before training."""

import pytest
import torch
from transformers import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

from mmtune.models.fusion.gated_cross import GatedCrossAttention

NAMES = {
    "attention.query": "cross_attn.q_proj",
    "attention.key": "cross_attn.k_proj",
    "attention.value": "cross_attn.v_proj",
    "attention.output": "cross_attn.o_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}


@pytest.fixture
def pair():
    torch.manual_seed(0)
    config = IdeficsConfig(
        hidden_size=16,
        num_attention_heads=4,
        intermediate_size=24,
        dropout=0.0,
        qk_layer_norms=False,
        vision_config={"embed_dim": 10},
    )
    config._attn_implementation = "eager"
    theirs = IdeficsGatedCrossAttentionLayer(config, layer_idx=0)
    ours = GatedCrossAttention(16, 4, 10, 24)
    with torch.no_grad():
        for mine, other in NAMES.items():
            ours.get_submodule(mine).weight.copy_(theirs.get_submodule(other).weight)
        for mine, other in (("attention_gate", "alpha_cross_attn"), ("mlp_gate", "alpha_dense")):
            theirs.get_parameter(other).fill_(0.7)
            ours.get_parameter(mine).fill_(0.7)
    return ours, theirs


def test_values_and_gradients_are_idefics(pair):
    ours, theirs = pair
    hidden, media = torch.randn(2, 5, 16), torch.randn(2, 6, 10)
    seen = torch.rand(2, 5, 6) < 0.5
    seen[..., 0], seen[1, 2], seen[0, 0] = True, False, False
    inputs = [[part.clone().requires_grad_() for part in (hidden, media)] for _ in range(2)]
    mask = torch.zeros(2, 1, 5, 6).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)
    wanted = theirs(
        inputs[0][0],
        image_hidden_states=inputs[0][1],
        image_attention_mask=mask,
        cross_attention_gate=seen.any(-1).float(),
    )
    found = ours(*inputs[1], seen)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    slope = torch.randn_like(found)
    (found * slope).sum().backward()
    (wanted * slope).sum().backward()
    for mine, other in zip(inputs[1], inputs[0], strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-5)
    for mine, other in NAMES.items():
        torch.testing.assert_close(
            ours.get_submodule(mine).weight.grad, theirs.get_submodule(other).weight.grad, rtol=1e-5, atol=1e-5
        )
    torch.testing.assert_close(ours.attention_gate.grad, theirs.alpha_cross_attn.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.mlp_gate.grad, theirs.alpha_dense.grad, rtol=1e-5, atol=1e-5)


def test_shut_gates_are_the_identity_and_learn(pair):
    ours, _ = pair
    ours.reset_parameters()
    hidden = torch.randn(2, 5, 16)
    made = ours(hidden, torch.randn(2, 6, 10))
    assert torch.equal(made, hidden)
    made.square().sum().backward()
    assert ours.attention_gate.grad.abs() > 0 and ours.mlp_gate.grad.abs() > 0


def test_tokens_see_their_own_medium_alone(pair):
    ours, _ = pair
    hidden, media = torch.randn(1, 4, 16), torch.randn(1, 6, 10, requires_grad=True)
    seen = torch.zeros(1, 4, 6, dtype=torch.bool)
    seen[:, :2, :3], seen[:, 3, 3:] = True, True
    ours(hidden, media, seen)[:, :3].sum().backward()
    assert media.grad[:, :3].abs().min() > 0 and media.grad[:, 3:].abs().max() == 0
