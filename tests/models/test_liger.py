"""Liger's kernels are asked for where they can work, without Liger's own loss (the kernels need a GPU to run)."""

import sys
from types import ModuleType

import pytest
import torch
import transformers.integrations.liger as integration
import transformers.utils as utils
from transformers import LlamaConfig, LlamaForCausalLM

from mmtune.errors import CapabilityError
from mmtune.models import liger
from mmtune.models.liger import use_liger


@pytest.fixture
def asked(monkeypatch):
    """What a stand-in for liger-kernel was asked for."""
    calls = []
    package, inner = ModuleType("liger_kernel.transformers"), ModuleType("liger_kernel.transformers.monkey_patch")
    package._apply_liger_kernel_to_instance = lambda model, **options: calls.append((model, options))
    inner.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    for module in (ModuleType("liger_kernel"), package, inner):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(utils, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(integration, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return calls


def tiny():
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**small, vocab_size=16))


def test_kernels_without_their_loss(asked):
    model = tiny()
    assert use_liger(model)
    assert asked == [(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})]


def test_a_family_that_liger_does_not_know(asked):
    model = tiny()
    model.config.model_type = "another"
    assert not use_liger(model) and not asked


def test_kernels_of_another_transformers(asked, monkeypatch):
    def apply(model, **options):
        raise ImportError("cannot import name 'LlamaOutput'")

    monkeypatch.setattr(sys.modules["liger_kernel.transformers"], "_apply_liger_kernel_to_instance", apply)
    monkeypatch.setattr(liger, "version", lambda name: "1.0")
    with pytest.raises(CapabilityError, match=r"liger-kernel 1.0 does not go with llama .*'LlamaOutput'"):
        liger.use_liger(tiny())


def test_training_goes_on_without_them(monkeypatch):
    from mmtune.recipe.finetune import Finetune
    from mmtune.stages.finetune.base import _set_course
    from mmtune.talk import Talk

    def refuse(model):
        raise CapabilityError("liger-kernel 1.0 does not go with llama")

    monkeypatch.setattr(liger, "use_liger", refuse)
    console = Talk(quiet=True)
    _set_course(tiny(), Finetune(), 20.0, console)
    assert any("the model trains with its own operations" in line for line in console.lines)


def test_without_a_gpu(asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not use_liger(tiny()) and not asked
