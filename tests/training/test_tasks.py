"""The loss over tasks is the weighted sum of their losses, of separate rows and of packed trees."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from mmtune.encoding.collate import Collator
from mmtune.encoding.tree import TREE_SCHEMA, tree_rows, tree_to_row
from mmtune.errors import RecipeError
from mmtune.training.batching import Batching, Split, packed_trees, rows_apart
from mmtune.training.ledger import Ledger
from mmtune.training.loss import answer_loss
from mmtune.training.tasks import by_parts, tasks_of
from tests.training.test_tree_batch import error, gradients, trees_of

NAMES = ("caption", "count", "vqa")
COURSE = {"seed": 0, "batch_tokens": 10**6, "batch_rows": None, "batch_media_tokens": None, "micro_batches": 1}


@pytest.fixture
def known(tiny_family: Any, media: Any, served: Any) -> Any:
    return known_of(tiny_family("qwen2_5_vl"), media, served)


def known_of(family: Any, media: Any, served: Any) -> Any:
    """The family, its split, its tasks' table, and every row with its task."""
    trees = [
        tree_to_row(tree) | {"example_ids": [f"{number}/{k}" for k in range(len(tree.example_ids))]}
        for number, tree in enumerate(trees_of(family, media, served))
    ]
    split = Split(pa.Table.from_pylist(trees, TREE_SCHEMA), Collator(family.processor, media_root=Path()))
    ids = [name for row in trees for name in row["example_ids"]]
    told = pa.table({"id": ids, "task": [NAMES[number % 3] for number in range(len(ids))]})
    rows = [row for tree in split.trees.trees(range(len(trees))) for row in tree_rows(tree)]
    return family, split, told, list(zip(rows, told["task"].to_pylist(), strict=True))


def batching_of(family: Any, split: Split, layout: str) -> Batching:
    course = {**COURSE, "epochs": 1.0}
    return packed_trees(family.model, split, course) if layout == "trees" else rows_apart(split, course)


@pytest.mark.parametrize("layout", ["rows", "trees"])
@pytest.mark.parametrize("weights", [dict.fromkeys(NAMES, 1.0), {"vqa": 0.0, "count": 2.5}], ids=["ones", "others"])
def test_it_is_the_weighted_sum_of_each_tasks_loss(known: Any, layout: str, weights: dict[str, float]) -> None:
    family, split, told, rows = known
    ledger = Ledger()
    plain = batching_of(family, split, layout)
    made = by_parts(plain, tasks_of([told], weights, "finetune"), ledger, apart=False)
    sums = {name: torch.zeros(()) for name in NAMES}
    counts = dict.fromkeys(NAMES, 0)
    for row, task in rows:
        loss, count = answer_loss(family.model, split.collate([row]))
        sums[task], counts[task] = sums[task] + loss, counts[task] + count
    expected = torch.stack([sums[name] * weights.get(name, 1.0) for name in NAMES]).sum()
    wanted = gradients(family.model, expected)
    units = plain.plan.epoch_batches(0)
    assert len(units) == 1
    family.model.train()
    loss, count = made.loss(family.model, made.batches.batch(units[0], 0))
    family.model.eval()
    assert count == sum(counts.values())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert error(gradients(family.model, loss), wanted) < 1e-5
    assert ledger.line() == {}, "what does not count is not logged"
    ledger.counted()
    each = {f"loss_task_{name}": float(sums[name].detach()) / counts[name] for name in NAMES}
    assert ledger.line() == pytest.approx(each, rel=1e-5)
    if set(weights.values()) == {1.0}:
        torch.testing.assert_close(loss, answer_loss(family.model, plain.batches.batch(units[0], 0), made.rules)[0])


def test_tasks_weigh_what_passes_lose_alone_too(tiny_family: Any, media: Any, served: Any) -> None:
    family = deepcopy(tiny_family("composite_hybrid"))
    family.model.config.fusion = {**family.model.config.fusion, "auxiliary_loss": 0.4}
    family.model.model.behaviour_tower.config.unknown_rate = 0.0
    family, split, told, rows = known_of(family, media, served)
    weights, ledger = {"vqa": 0.0, "count": 2.5}, Ledger()
    made = by_parts(batching_of(family, split, "trees"), tasks_of([told], weights, "finetune"), ledger, apart=True)
    family.model.train()
    sums = [float(answer_loss(family.model, split.collate([row]))[0].detach()) for row, _ in rows]
    expected = sum(own * weights.get(task, 1.0) for own, (_, task) in zip(sums, rows, strict=True))
    loss, _ = made.loss(family.model, made.batches.batch(made.plan.epoch_batches(0)[0], 0))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    ledger.counted()
    named = {*(f"loss_task_{name}" for name in NAMES), "loss_mixture"}
    assert set(ledger.line()) == named | {f"loss_alone_{branch}" for branch in family.model.config.branches}


def test_held_out_rows_are_noted_apart(known: Any) -> None:
    family, split, told, _ = known
    ledger = Ledger()
    made = by_parts(batching_of(family, split, "trees"), tasks_of([told], {}, "finetune"), ledger, apart=False)
    with torch.no_grad():
        made.loss(family.model, made.batches.batch(made.plan.epoch_batches(0)[0]))
    ledger.counted()
    assert ledger.line() == {} and set(ledger.held_out_line()) == {f"val_loss_task_{name}" for name in NAMES}


def test_the_weight_of_an_only_task_counts_too(known: Any) -> None:
    family, split, told, _ = known
    alone = told.set_column(told.column_names.index("task"), "task", [["vqa"] * len(told)])
    plain, ledger = batching_of(family, split, "trees"), Ledger()
    made = by_parts(plain, tasks_of([alone], {"vqa": 0.25}, "finetune"), ledger, apart=False)
    units = plain.plan.epoch_batches(0)[0]
    with torch.no_grad():
        (whole, _), (quarter, _) = (one.loss(family.model, one.batches.batch(units)) for one in (plain, made))
    assert float(quarter) == pytest.approx(0.25 * float(whole), rel=1e-5)
    ledger.counted()
    assert set(ledger.held_out_line() | ledger.line()) <= {"val_loss_task_vqa", "loss_task_vqa"}


def test_weights_of_no_task_are_refused(known: Any) -> None:
    family, split, told, _ = known
    with pytest.raises(RecipeError, match="task_weights names the task vqq, of which there is no row"):
        tasks_of([told], {"vqq": 1.0}, "finetune")
    with pytest.raises(RecipeError, match="no task a weight above 0"):
        tasks_of([told], dict.fromkeys(NAMES, 0.0), "finetune")
    plain = batching_of(family, split, "rows")
    assert by_parts(plain, tasks_of([told.slice(0, 1)], {}, "finetune"), Ledger(), apart=False) is plain
