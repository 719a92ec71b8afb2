"""The loss against transformers' own, with a head that sees only the tokens that count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from mmtune.encoding.collate import Collator
from mmtune.records import Message, TextPart
from mmtune.training import loss as module
from mmtune.training.loss import answer_loss, chunked_cross_entropy


@pytest.mark.parametrize("n", [0, 1, 5, 12])
def test_chunks_change_nothing(monkeypatch: Any, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    logits = torch.randn(n, 11, generator=generator, requires_grad=True)
    targets = torch.randint(11, (n,), generator=generator)
    expected = functional.cross_entropy(logits, targets, reduction="sum")
    (wanted,) = torch.autograd.grad(expected, logits)
    monkeypatch.setattr(module, "_CHUNK_LOGITS", 44)
    found = chunked_cross_entropy(logits, targets)
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
