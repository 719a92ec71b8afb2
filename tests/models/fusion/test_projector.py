"""Projectors equal LLaVA's, IDEFICS's and InstructBLIP's with copied weights; masked features count for nothing."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import InstructBlipQFormerConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerEncoder
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from mmtune.errors import RecipeError
from mmtune.models.fusion.projector import PROJECTORS, build_projector, projected_tokens


def assert_same_results(ours, theirs, features, pairs, tolerance=1e-5):
    """Values, gradients of the features and of each pair of weights agree."""
    mine, other = features.clone().requires_grad_(), features.clone().requires_grad_()
    found, wanted = ours(mine), theirs(other)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    slope = torch.randn_like(found)
    (found * slope).sum().backward()
    (wanted * slope).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=tolerance, atol=tolerance)
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=2 * tolerance)


def test_mlp_is_llavas():
    torch.manual_seed(0)
    config = SimpleNamespace(
        vision_feature_layer=-2,
        vision_config=SimpleNamespace(hidden_size=10),
        text_config=SimpleNamespace(hidden_size=16),
        multimodal_projector_bias=True,
        projector_hidden_act="gelu",
    )
    theirs, ours = LlavaMultiModalProjector(config), build_projector("mlp", 10, 16)
    ours.load_state_dict(theirs.state_dict())
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    assert_same_results(ours, theirs, torch.randn(2, 5, 10), pairs)


def test_perceiver_is_idefics():
    torch.manual_seed(0)
    config = SimpleNamespace(
        perceiver_config=SimpleNamespace(qk_layer_norms_perceiver=False), vision_config=SimpleNamespace(embed_dim=16)
    )
    theirs = IdeficsPerceiverResampler(config, 16, depth=2, n_heads=4, head_dim=4, n_latents=3)
    ours = build_projector("perceiver", 10, 16, queries=3, layers=2, heads=4)
    names = [
        ("context_norm", 0, "context_layer_norm"),
        ("query_norm", 0, "latents_layer_norm"),
        ("attention.query", 0, "q_proj"),
        ("attention.key", 0, "k_proj"),
        ("attention.value", 0, "v_proj"),
        ("attention.output", 0, "output_proj"),
        ("inner_norm", 1, "ln"),
        ("inner", 1, "fc"),
        ("outer", 1, "c_proj"),
    ]
    pairs = [(ours.queries, theirs.latents), (ours.norm.weight, theirs.layer_norm.weight)]
    for mine, block in zip(ours.layers, theirs.blocks, strict=True):
        pairs += [(mine.get_submodule(a).weight, block[i].get_submodule(b).weight) for a, i, b in names]
    with torch.no_grad():
        for a, b in pairs:
            a.copy_(b)
    assert_same_results(ours, lambda features: theirs(ours.source(features)), torch.randn(2, 5, 10), pairs)


QFORMER = {
    "self_attention.attention.query": "attention.attention.query",
    "self_attention.attention.key": "attention.attention.key",
    "self_attention.attention.value": "attention.attention.value",
    "self_attention.attention.output": "attention.output.dense",
    "self_attention.norm": "attention.output.LayerNorm",
    "cross_attention.attention.query": "crossattention.attention.query",
    "cross_attention.attention.key": "crossattention.attention.key",
    "cross_attention.attention.value": "crossattention.attention.value",
    "cross_attention.attention.output": "crossattention.output.dense",
    "cross_attention.norm": "crossattention.output.LayerNorm",
    "query_feed_forward.inner": "intermediate_query.dense",
    "query_feed_forward.outer": "output_query.dense",
    "query_feed_forward.norm": "output_query.LayerNorm",
    "instruction_feed_forward.inner": "intermediate.dense",
    "instruction_feed_forward.outer": "output.dense",
    "instruction_feed_forward.norm": "output.LayerNorm",
}


def qformer_pair():
    torch.manual_seed(0)
    config = InstructBlipQFormerConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        encoder_hidden_size=10,
        cross_attention_frequency=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config._attn_implementation = "eager"
    theirs = InstructBlipQFormerEncoder(config)
    ours = build_projector("qformer", 10, 16, queries=3, layers=2, heads=4)
    modules = []
    for mine, other in zip(ours.layers, theirs.layer, strict=True):
        modules += [(mine.get_submodule(a), other.get_submodule(b)) for a, b in QFORMER.items()]
    for mine, other in modules:
        mine.load_state_dict(other.state_dict())
    return ours, theirs, modules


@pytest.mark.parametrize("instructed", [False, True])
def test_qformer_is_instructblips(instructed):
    ours, theirs, modules = qformer_pair()
    instruction = torch.randn(2, 16) if instructed else None
    seen = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    mask = torch.zeros(2, 1, 1, 5).masked_fill(~seen[:, None, None], torch.finfo(torch.float32).min)

    def wanted(features):
        made = ours.queries.expand(2, -1, -1)
        if instruction is not None:
            made = torch.cat((made, instruction[:, None]), dim=1)
        made = theirs(
            ours.norm(made), encoder_hidden_states=features, encoder_attention_mask=mask, query_length=3
        ).last_hidden_state
        return made[:, :3]

    used = [(a.weight, b.weight) for a, b in modules]
    # The last layer's own output for the instruction is read by nobody.
    used = [(a, b) for a, b in used if instructed or "instruction" not in name_of(ours, a)]
    used = [(a, b) for a, b in used if not name_of(ours, a).startswith("layers.1.instruction")]
    assert_same_results(lambda features: ours(features, seen, instruction), wanted, torch.randn(2, 5, 10), used)


def name_of(module: nn.Module, parameter: nn.Parameter) -> str:
    return next(name for name, other in module.named_parameters() if other is parameter)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_shapes_are_known_beforehand(kind):
    projector = build_projector(kind, 10, 16, queries=3, heads=4)
    made = projector(torch.randn(2, 5, 10), torch.ones(2, 5, dtype=torch.bool), torch.randn(2, 16))
    assert made.shape == (2, projected_tokens(kind, 5, 3), 16)


@pytest.mark.parametrize("kind", ["perceiver", "qformer"])
def test_masked_features_count_for_nothing(kind):
    torch.manual_seed(0)
    projector = build_projector(kind, 10, 16, queries=3, heads=4)
    features = torch.randn(1, 5, 10, requires_grad=True)
    seen = torch.tensor([[1, 1, 1, 0, 0]], dtype=torch.bool)
    made = projector(features, seen)
    torch.testing.assert_close(made, projector(features[:, :3]), rtol=1e-5, atol=1e-5)
    made.square().sum().backward()
    assert features.grad[:, 3:].abs().max() == 0 and features.grad[:, :3].abs().max() > 0
    nothing = projector(features, torch.zeros(1, 5, dtype=torch.bool))
    assert nothing.isfinite().all()
    assert torch.equal(nothing, projector(2 * features, torch.zeros(1, 5, dtype=torch.bool)))


@pytest.mark.parametrize("kind", ["perceiver", "qformer"])
def test_the_instruction_changes_what_is_asked(kind):
    torch.manual_seed(0)
    projector = build_projector(kind, 10, 16, queries=3, heads=4)
    features, instruction = torch.randn(1, 5, 10), torch.randn(1, 16, requires_grad=True)
    made = projector(features, None, instruction)
    assert (made - projector(features, None, -instruction)).abs().max() > 1e-3
    made.square().sum().backward()
    assert instruction.grad.abs().max() > 0


def test_unknown_kinds_and_heads_are_named():
    with pytest.raises(RecipeError, match="'conv'"):
        build_projector("conv", 10, 16)
    with pytest.raises(RecipeError, match="5 heads of a qformer"):
        build_projector("qformer", 10, 16, heads=5)
