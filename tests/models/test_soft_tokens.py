"""Soft tokens in the middle of a text: they are ordinary places, in every family, and come back from their folder."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmtune.encoding.collate import Collator
from mmtune.encoding.tree import build_trees
from mmtune.errors import DataError, RecipeError
from mmtune.models.adapter import save_tuned
from mmtune.models.load import load_model, load_tuned
from mmtune.models.mask_rules import mask_rules
from mmtune.models.method import with_method
from mmtune.models.rope_index import rope_index
from mmtune.models.soft_tokens import FILE, add_soft_tokens, first_vectors, soft_tokens
from mmtune.models.towers import fingerprints
from mmtune.records import SOFT_ID, Message, SoftPart, TextPart
from mmtune.training.loss import answer_loss
from mmtune.training.tree_batch import TreeCollator
from tests.training.conftest import MODELS, media, served, tiny_family

__all__ = ["media", "served", "tiny_family"]
LORA = {"targets": None, "r": 4, "alpha": 8}


def talk(*parts: Any, answer: str = "it is red") -> list[Message]:
    return [Message("user", parts), Message("assistant", (TextPart(answer),))]


def shown(family: Any, media: Any, served: dict[str, Any]) -> list[Any]:
    parts = []
    for kind in sorted(family.takes):
        made, real = media.of(kind)
        served[made.path] = real[kind]
        parts.append(made)
    return parts


def loss(model: Any, family: Any, rows: list[Any]) -> torch.Tensor:
    return answer_loss(model, Collator(family.processor, media_root=Path())(rows))[0]


@pytest.mark.parametrize("name", list(MODELS))
def test_started_from_words_they_are_these_words(name: str, tiny_family: Any, media: Any, served: Any) -> None:
    """The same ids typed in their places give the same loss, in every family."""
    family = tiny_family(name)
    parts = shown(family, media, served)
    row = family.renderer.encode(talk(TextPart("Look: "), SoftPart(3), TextPart(" which "), *parts, SoftPart(2)))
    soft = np.flatnonzero(row.input_ids >= SOFT_ID)
    assert (row.input_ids[soft] - SOFT_ID).tolist() == [0, 1, 2, 3, 4] and (row.labels[soft] == -100).all()
    words = [7, 9, 11, 13, 8]
    typed = deepcopy(row)
    typed.input_ids[soft] = words
    model = add_soft_tokens(deepcopy(family.model), first_vectors(family.model, 5, "text", words))
    with torch.no_grad():
        expected = loss(family.model, family, [typed])
        assert float(loss(model, family, [row])) == pytest.approx(float(expected), rel=1e-5)
        # Rows without soft tokens are what they were.
        assert float(loss(model, family, [typed])) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", ["text_llama3", "llava", "qwen2_5_vl", "gemma3", "composite"])
def test_trees_share_them(name: str, tiny_family: Any, media: Any, served: Any) -> None:
    family = tiny_family(name)
    parts = shown(family, media, served)
    rows = [
        family.renderer.encode(talk(*parts, SoftPart(4), TextPart(f" {question}")))
        for question in ("How many?", "Which?")
    ]
    model = with_method(
        deepcopy(family.model), "prompt", towers=["llm"], lora={}, virtual_tokens=9, base_path="", soft_tokens=4
    )
    assert [name for name, p in model.named_parameters() if p.requires_grad and "soft_tokens" not in name] == []
    (tree,) = build_trees(rows, ["a", "b"], 4096)
    own = soft_tokens(model)
    assert own is not None

    def gradient(batch: Any, rules: Any = None) -> tuple[float, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        found, _ = answer_loss(model, batch, rules)
        found.backward()
        return float(found.detach()), own.weight.grad.clone()

    collate = Collator(family.processor, media_root=Path())
    apart, wanted = gradient(collate(rows))
    together, found = gradient(TreeCollator(collate, rope_index(model))([[tree]]), mask_rules(model))
    assert together == pytest.approx(apart, rel=1e-5)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5 and float(wanted.norm()) > 0


@pytest.mark.parametrize("method", ["prompt", "lora"])
def test_they_train_and_come_back(method: str, tiny_family: Any, media: Any, served: Any, tmp_path: Path) -> None:
    family = tiny_family("llava")
    family.model.save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    row = family.renderer.encode(talk(*shown(family, media, served), SoftPart(4), TextPart(" which?")))
    settings = {"towers": ["llm"], "lora": LORA, "virtual_tokens": 9, "base_path": base, "soft_tokens": 4}
    model = with_method(load_model(base), method, **settings, soft_prompt={"init": "vocabulary", "text_ids": []})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    first = None
    for _ in range(8):
        optimizer.zero_grad()
        found = loss(model, family, [row])
        found.backward()
        optimizer.step()
        first = float(found.detach()) if first is None else first
    assert float(found.detach()) < first
    inner = model.get_base_model() if method == "lora" else model
    after = {name.replace("base_layer.", ""): value for name, value in fingerprints(inner).items()}
    kept = {name: value for name, value in after.items() if "lora_" not in name and "soft_tokens" not in name}
    assert kept == fingerprints(load_model(base))
    save_tuned(model, tmp_path / "adapter")
    files = {file.name for file in (tmp_path / "adapter").glob("*.safetensors")}
    assert files == ({FILE, "adapter_model.safetensors"} if method == "lora" else {FILE})
    back = load_tuned(base, tmp_path / "adapter")
    with torch.no_grad():
        assert float(loss(back, family, [row])) == pytest.approx(float(loss(model.eval(), family, [row])), rel=1e-5)
        batch = Collator(family.processor, media_root=Path(), left=True)([row])
        del batch["labels"]
        made = back.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert made.shape[1] == row.input_ids.size + 3


def test_a_renderer_without_them_writes_the_text_alone(tiny_family: Any) -> None:
    encode = tiny_family("text_llama3").renderer.without_soft_tokens().encode
    found = encode(talk(TextPart("Look: "), SoftPart(3), TextPart("which?")))
    assert found.input_ids.tolist() == encode(talk(TextPart("Look: which?"))).input_ids.tolist()


def test_what_was_never_trained_is_refused(tiny_family: Any) -> None:
    family = tiny_family("text_llama3")
    model = add_soft_tokens(deepcopy(family.model), torch.zeros(2, 32))
    with pytest.raises(DataError, match="soft token 3"):
        loss(model, family, [family.renderer.encode(talk(SoftPart(3), TextPart("which?")))])
    with pytest.raises(RecipeError, match="method prefix does not train"):
        with_method(
            deepcopy(family.model), "prefix", towers=["llm"], lora={}, virtual_tokens=9, base_path="", soft_tokens=4
        )


def test_soft_tokens_of_a_template_start_from_labels_too():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))
    table = model.get_input_embeddings().weight.detach()
    found = first_vectors(model, 3, "labels", (), [[7], [11, 5]])
    assert torch.allclose(found[:2], torch.stack((table[7], (table[11] + table[5]) / 2)))
    assert any(torch.equal(found[2], other) for other in table)
    assert torch.equal(first_vectors(model, 1, "labels", (), [[7], [9]]), table[[7]])
