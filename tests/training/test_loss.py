"""The loss against transformers' own, with a head that sees only the tokens that count."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from mmtune.encoding.collate import Collator
from mmtune.records import Message, TextPart
from mmtune.training import cross_entropy as module
from mmtune.training.cross_entropy import cross_entropy
from mmtune.training.loss import answer_loss


@pytest.mark.parametrize("n", [0, 1, 5, 12])
def test_chunks_change_nothing(monkeypatch: Any, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    logits = torch.randn(n, 11, generator=generator, requires_grad=True)
    targets = torch.randint(11, (n,), generator=generator)
    expected = functional.cross_entropy(logits, targets, reduction="sum")
    (wanted,) = torch.autograd.grad(expected, logits)
    monkeypatch.setattr(module, "_MOST_LOGITS", 44)
    found = cross_entropy(logits, targets)
    (gradient,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, wanted)


def test_rows_have_the_loss_of_transformers(tiny_family: Any, monkeypatch: Any) -> None:
    family = tiny_family("text_llama3")
    rows = [
        family.renderer.encode([Message("user", (TextPart("Hello"),)), Message("assistant", (TextPart(answer),))])
        for answer in ("three of them", "yes")
    ]
    batch = Collator(family.processor, media_root=Path())(rows)
    head, shapes = family.model.get_output_embeddings(), []
    hook = head.register_forward_hook(lambda _, given, made: shapes.append(tuple(made.shape)))
    found, count = answer_loss(family.model, batch)
    hook.remove()
    expected = family.model(**batch).loss
    torch.testing.assert_close(found / count, expected)
    # Never T x V: one row of logits per label.
    assert shapes == [(1, count, family.model.config.vocab_size)]
    assert family.model(**batch).logits.shape[1] == batch["input_ids"].shape[1], "the head is as it was"


@pytest.mark.parametrize("trained", ["head", "lora of the head", "lora"])
def test_many_logits_never_stand_at_once(tiny_family: Any, monkeypatch: Any, trained: str) -> None:
    """The head sees a part of the label tokens at a time; loss and gradients stay."""
    family = tiny_family("text_llama3")
    model: Any = copy.deepcopy(family.model).train()
    if trained != "head":
        parts = ["q_proj", "lm_head"] if trained == "lora of the head" else ["q_proj"]
        model = get_peft_model(model, LoraConfig(r=2, target_modules=parts, init_lora_weights=False))
    row = [Message("user", (TextPart("Hello"),)), Message("assistant", (TextPart("three of them, " * 4),))]
    batch = Collator(family.processor, media_root=Path())([family.renderer.encode(row)])
    trains = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def found() -> tuple[torch.Tensor, list[int], list[torch.Tensor]]:
        seen: list[int] = []
        head = model.get_output_embeddings()
        hook = head.register_forward_hook(lambda _, given, made: seen.append(made.shape[1] * made.shape[-1]))
        loss, _ = answer_loss(model, batch)
        hook.remove()
        return loss, seen, list(torch.autograd.grad(loss, list(trains.values()), allow_unused=True))

    whole, (at_once,), wanted = found()
    vocabulary = model.config.vocab_size
    monkeypatch.setattr(module, "_MOST_LOGITS", 4 * vocabulary)
    loss, seen, gradients = found()
    # Inside the model the head hands on what it is given.
    apart = [logits for logits in seen if logits % vocabulary == 0]
    assert max(apart) == 4 * vocabulary < at_once == sum(apart)
    torch.testing.assert_close(loss, whole)
    for name, ours, theirs in zip(trains, gradients, wanted, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), name


@pytest.mark.parametrize("frozen", [True, False])
def test_every_token_has_its_own_weight(monkeypatch: Any, frozen: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(5, 11).requires_grad_(not frozen)
    hidden, weights = (torch.randn(size, generator=generator) for size in ((7, 5), (7,)))
    targets = torch.randint(11, (7,), generator=generator)

    def found() -> list[torch.Tensor]:
        own = hidden.clone().requires_grad_()
        total = (cross_entropy(own, targets, "none", head) * weights).sum()
        return [total.detach(), *torch.autograd.grad(total, [own, *([] if frozen else head.parameters())])]

    whole = found()
    monkeypatch.setattr(module, "_MOST_LOGITS", 22)
    for ours, theirs in zip(found(), whole, strict=True):
        torch.testing.assert_close(ours, theirs)
