"""The check before training says yes to a right layout and no to a wrong one, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmtune.encoding.collate import Collator
from mmtune.encoding.tree import build_trees
from mmtune.models.rope_index import rope_index
from mmtune.records import Message, TextPart
from mmtune.training import tree_check
from mmtune.training.packing import TreeLengths
from mmtune.training.tree_batch import TreeCollator
from mmtune.training.tree_check import check_trees, trees_to_check


@pytest.fixture
def case(tiny_family: Any, media: Any, served: Any) -> tuple[Any, Any, TreeCollator]:
    family = tiny_family("qwen2_vl")
    medium, real = media.image(60, 90)
    served[medium.path] = real["image"]
    rows = [
        family.renderer.encode([Message("user", (medium, TextPart(q))), Message("assistant", (TextPart("yes"),))])
        for q in ("Is it red?", "Is the cat on the left?")
    ]
    trees = list(build_trees(rows, ["a", "b"], 4096))
    return family.model, trees, TreeCollator(Collator(family.processor, media_root=Path()), rope_index(family.model))


def test_exact(case: Any) -> None:
    model, trees, collate = case
    model.train()
    found = check_trees(model, trees, collate)
    assert found.exact and found.loss_error < 1e-5 and found.gradient_error < 1e-5 and not found.reason
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_wrong_positions_are_seen(case: Any) -> None:
    model, trees, collate = case
    found = check_trees(model, trees, TreeCollator(collate.collate, rope=None))
    assert not found.exact and found.gradient_error > 1e-3 and "gradients" in found.reason


def test_a_model_that_fails_on_trees(case: Any, monkeypatch: Any) -> None:
    model, trees, collate = case
    real = model.forward

    def forward(**inputs: Any) -> Any:
        if inputs["attention_mask"].ndim == 4:
            raise ValueError("attention_mask must be 2-D")
        return real(**inputs)

    monkeypatch.setattr(model, "forward", forward)
    found = check_trees(model, trees, collate)
    assert not found.exact and "must be 2-D" in found.reason


def test_bf16_is_measured_against_itself(case: Any) -> None:
    from copy import deepcopy

    model, trees, collate = case
    found = check_trees(deepcopy(model).to(torch.bfloat16), trees, collate)
    assert found.exact and found.tolerance > tree_check._TOLERANCE


def test_gradients_that_are_no_numbers_are_no_proof(case: Any, monkeypatch: Any) -> None:
    model, trees, collate = case
    norms = iter([1.0, float("nan")] * 2)
    monkeypatch.setattr(tree_check, "gradient_norm", lambda *_: next(norms))
    found = check_trees(model, trees, collate)
    assert not found.exact and found.loss_error < 1e-5 and "nan" in found.reason


def test_rows_that_differ_by_their_padding_prove_nothing(case: Any, monkeypatch: Any) -> None:
    model, trees, collate = case
    errors = iter([(0.0, 0.5), (0.0, 0.4)])
    monkeypatch.setattr(tree_check, "_difference", lambda *_: next(errors))
    found = check_trees(model, trees, collate)
    assert not found.exact and found.tolerance == tree_check._MOST_TOLERANCE


def test_no_batch_is_larger_than_in_training(case: Any, monkeypatch: Any) -> None:
    model, trees, collate = case
    (tree,) = trees
    limit = tree.input_ids.size + 5
    sizes: list[int] = []
    real = tree_check.answer_loss

    def loss(model: Any, batch: Any, *rest: Any) -> Any:
        sizes.append(batch["input_ids"].numel())
        return real(model, batch, *rest)

    monkeypatch.setattr(tree_check, "answer_loss", loss)
    assert check_trees(model, [tree, tree], collate, batch_tokens=limit).exact
    # Two questions of each of two trees, apart, and the two trees.
    assert len(sizes) == 6 and max(sizes) <= limit


def test_trees_that_stand_for_the_split() -> None:
    lengths = TreeLengths(np.array([9, 5, 90, 40, 30]), np.zeros(5, int), np.array([1, 2, 3, 2, 2]))
    assert [found.tolist() for found in trees_to_check(lengths, np.zeros(5, int))] == [[2, 4]]
    assert [found.tolist() for found in trees_to_check(lengths, np.array([1, 0, 1, 0, 1]))] == [[1, 3], [2, 4]]
    plain = TreeLengths(np.array([9, 5, 7]), np.zeros(3, int), np.ones(3, int))
    assert [found.tolist() for found in trees_to_check(plain, np.zeros(3, int))] == [[0, 1]]
