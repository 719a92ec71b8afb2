"""Blocks as two operations: transformers' and PEFT's numbers and gradients, and a way round where they do not fit."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from mmtune.models.decoder_block import FusedBlock, fused_blocks
from mmtune.models.lora_linear import fuse_lora
from mmtune.models.segments import Piece, with_pieces

TOKENS, PREFIX = 13, 8
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "biases": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "wide heads": (LlamaForCausalLM, LlamaConfig(**SIZES, head_dim=16)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
}
OTHERS = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES), 0),  # norms of queries and keys
    "granite": (GraniteForCausalLM, GraniteConfig(**SIZES, residual_multiplier=0.5), 0),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config(**SIZES, no_rope_layers=[1, 1, 0]), 2),
    "gelu": (LlamaForCausalLM, LlamaConfig(**SIZES, hidden_act="gelu"), 0),
}


def adapted(family, config, targets="all-linear", **options):
    torch.manual_seed(0)
    model = get_peft_model(family(config), LoraConfig(r=4, lora_alpha=6, target_modules=targets, **options))
    fuse_lora(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or name.endswith("bias") or "norm" in name:
                parameter.normal_(0.5 if "norm" in name else 0.0, 0.3)
    return model.train()


def inputs(rows=2):
    torch.manual_seed(1)
    causal = torch.ones(TOKENS, TOKENS).tril().bool()
    mask = torch.zeros(rows, 1, TOKENS, TOKENS).masked_fill(~causal, torch.finfo(torch.float32).min)
    pieces = [Piece((0, PREFIX), ((0, PREFIX),), True), Piece((PREFIX, TOKENS), ((0, TOKENS),))]
    return {
        "input_ids": torch.randint(1, 50, (rows, TOKENS)),
        "attention_mask": with_pieces(mask, [pieces] * rows, causal=True),
        "position_ids": torch.arange(TOKENS).expand(rows, TOKENS),
        "use_cache": False,
    }


@pytest.fixture
def runs(monkeypatch):
    """Whether each call of a block ran as two operations."""
    found, own = [], FusedBlock.run

    def noted(*given):
        made = own(*given)
        found.append(made is not None)
        return made

    monkeypatch.setattr(FusedBlock, "run", noted)
    return found


def results(model, context, given):
    model.zero_grad()
    with context:
        logits = model(**given).logits
        (logits.float() * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def assert_same(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj"], ["k_proj", "up_proj", "o_proj"]]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_are_the_familys_own(family, targets, runs):
    model, given = adapted(*FAMILIES[family], targets), inputs()
    wanted = results(model, nullcontext(), given)
    with fused_blocks(model) as blocks:
        assert blocks == 3
        runs.clear()
        found = results(model, nullcontext(), given)
    assert runs == [True] * 3
    assert_same(found, wanted)
    assert not any("forward" in vars(layer) for layer in model.base_model.model.model.layers)


@pytest.mark.parametrize("family", OTHERS)
def test_blocks_of_another_make_keep_their_own_way(family):
    *made, count = OTHERS[family]
    with fused_blocks(adapted(*made)) as blocks:
        assert blocks == count


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.1}])
def test_other_adapters_keep_pefts(options):
    with fused_blocks(adapted(*FAMILIES["llama"], **options)) as blocks:
        assert blocks == 0


def test_weights_that_train_keep_the_usual_way():
    with fused_blocks(LlamaForCausalLM(FAMILIES["llama"][1])) as blocks:
        assert blocks == 0


def _hooked(model):
    model.base_model.model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def _checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})


def _thawed(model):
    model.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight.requires_grad_()


def _norm_thawed(model):
    model.base_model.model.model.layers[1].input_layernorm.weight.requires_grad_()


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        (_hooked, [True, False, True]),
        (_checkpointed, [False] * 3),
        (_thawed, [True, False, True]),
        (_norm_thawed, [True, False, True]),
    ],
)
def test_a_block_in_which_more_happens_goes_its_own_way(change, fused, runs):
    model, given = adapted(*FAMILIES["llama"]), inputs()
    with fused_blocks(model):
        change(model)
        runs.clear()
        found = results(model, nullcontext(), given)
    assert runs[:3] == fused
    assert_same(found, results(model, nullcontext(), given))


def test_an_adapter_that_is_off_and_another_type_keep_their_meaning(runs):
    model, given = adapted(*FAMILIES["llama"]), inputs()
    with model.disable_adapter(), torch.no_grad():
        plain = model(**given).logits
    rough = results(model, torch.autocast("cpu", torch.bfloat16), given)
    with fused_blocks(model):
        runs.clear()
        with model.disable_adapter(), torch.no_grad():
            torch.testing.assert_close(model(**given).logits, plain)
        assert_same(results(model, torch.autocast("cpu", torch.bfloat16), given), rough)
    assert not any(runs)


def test_other_masks_and_a_cache_go_the_usual_way(runs):
    model, given = adapted(*FAMILIES["llama"]), inputs()
    with fused_blocks(model), torch.no_grad():
        runs.clear()
        model(**{**given, "attention_mask": inputs(rows=1)["attention_mask"]})
        model(input_ids=given["input_ids"], use_cache=True)
        model(input_ids=given["input_ids"], use_cache=False)
    assert runs == [False] * 9
