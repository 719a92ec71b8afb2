"""The utilisation counts the language model's matrices, by what trains of them."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mmtune.models.adapter import add_lora
from mmtune.training.flops import flops_per_token, peak_flops, utilisation_per_token


def llama(tied):
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, tie_word_embeddings=tied, **sizes))


def test_full_tuning_is_six_per_weight():
    layers = 2 * (4 * 8 * 8 + 3 * 8 * 12)
    for tied in (False, True):
        assert flops_per_token(llama(tied)) == 6 * (layers + 20 * 8)


def test_lora_is_four_per_frozen_weight_and_six_per_own():
    model = add_lora(llama(False), towers=("llm",), targets=["q_proj"], r=2, alpha=4)
    layers = 2 * (4 * 8 * 8 + 3 * 8 * 12)
    assert flops_per_token(model) == 4 * (layers + 20 * 8) + 6 * 2 * (2 * 8 + 2 * 8)


def test_head_and_last_block_work_for_label_tokens_alone():
    model = llama(False)
    head, own_of_last = 20 * 8, 2 * 8 * 8 + 3 * 8 * 12
    assert flops_per_token(model) - flops_per_token(model, 0.25) == 6 * 0.75 * (head + own_of_last)


def test_only_known_accelerators_have_a_peak():
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("Some TPU") is None
    assert utilisation_per_token(llama(True), torch.device("cpu"), 1) is None
