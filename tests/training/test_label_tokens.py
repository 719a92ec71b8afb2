"""Loss and gradients of label tokens alone are transformers' own, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mmtune.encoding.collate import Collator
from mmtune.models.label_tokens import only_label_tokens
from mmtune.records import Message, TextPart
from mmtune.training.loss import answer_loss, next_labels


def batch_of(family: Any, media: Any, served: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Two rows of unequal length, padded, with a medium where the family takes one."""
    rows = []
    for number, answer in enumerate(("three of them, hello world!", "yes")):
        shown = []
        for kind in sorted(family.takes):
            made, real = media.of(kind)
            served[made.path] = real[kind]
            shown.append(made)
        asked = Message("user", (*shown, TextPart("How many?" * (1 + number))))
        rows.append(family.renderer.encode([asked, Message("assistant", (TextPart(answer),))]))
    return Collator(family.processor, media_root=Path())(rows)


class Queries(TorchFunctionMode):
    """Writes down how many queries go through PyTorch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            self.asked.append(args[0].shape[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["text_llama3", "llava_bytes"])
def test_attention_of_the_last_block_is_asked_by_label_tokens(
    name: str, tiny_family: Any, media: Any, served: Any
) -> None:
    family = tiny_family(name)
    batch = batch_of(family, media, served)
    with Queries() as queries:
        answer_loss(family.model, batch)
    places = torch.unique((batch["labels"][:, 1:] != -100).nonzero()[:, 1])
    assert queries.asked[-2:] == [batch["input_ids"].shape[1], len(places)]


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_as_transformers_computes_it(family_name: str, tiny_family: Any, media: Any, served: Any) -> None:
    family = tiny_family(family_name)
    batch = batch_of(family, media, served)
    last, seen = family.model.get_decoder().layers[-1], []
    # Phi-3 makes queries, keys and values in one, for all tokens.
    parts = [last.mlp, last.self_attn.o_proj, *([last.self_attn.q_proj] if family_name != "text_phi3" else [])]
    hooks = [part.register_forward_hook(lambda _, given, made: seen.append(given[0].shape[:2])) for part in parts]
    loss, count = answer_loss(family.model, batch)
    found = gradients(family.model, loss)
    for hook in hooks:
        hook.remove()
    fusion = getattr(family.model.config, "fusion", {"mode": "early"})
    passes = len(getattr(family.model.config, "branches", ("joint",)))
    # What passes share runs before them, and bears no label here: one token stands for none.
    before = [(1, 1)] * len(parts) if passes > 1 and fusion["attention"] == "none" else []
    assert seen == before + [(1, count * passes)] * len(parts), "the last block runs for label tokens alone"
    expected_loss = family.model(**batch).loss * count
    expected = gradients(family.model, expected_loss)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert found.keys() == expected.keys()
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * max(value.norm(), 1e-3 * whole), name


def test_a_block_that_is_computed_again_runs_whole(tiny_family: Any, media: Any, served: Any) -> None:
    """Its second run, in the backward pass, comes after the context has ended."""
    family = tiny_family("qwen3_vl")
    batch = batch_of(family, media, served)
    expected = gradients(family.model, answer_loss(family.model, batch)[0])
    family.model.train()
    family.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        found = gradients(family.model, answer_loss(family.model, batch)[0])
    finally:
        family.model.gradient_checkpointing_disable()
        family.model.eval()
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * max(value.norm(), 1e-3 * whole), name


def test_nothing_stays_behind(tiny_family: Any, media: Any, served: Any) -> None:
    family = tiny_family("text_llama3")
    batch = batch_of(family, media, served)
    bears = next_labels(batch.pop("labels")) != -100
    before = family.model(**batch).logits
    with only_label_tokens(family.model, bears):
        assert family.model(**batch).logits.shape[:2] == (1, int(bears.sum()))
    assert torch.equal(family.model(**batch).logits, before)
