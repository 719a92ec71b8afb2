"""A whole epoch in packed bins is a whole epoch of rows: every answer once, the same total loss."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mmtune.encoding.collate import Collator
from mmtune.encoding.tree import TREE_SCHEMA, build_trees, tree_rows, tree_to_row
from mmtune.media.augment import Augmentation
from mmtune.models.mask_rules import mask_rules
from mmtune.models.rope_index import rope_index
from mmtune.records import Message, TextPart
from mmtune.training.batching import Split, packed_trees, rows_apart
from mmtune.training.data import PackedBatches, RowBatches, Trees, row_sizes, some_rows, tree_sizes
from mmtune.training.loss import answer_loss
from mmtune.training.packing import Packing, tree_costs, tree_lengths
from mmtune.training.plan import Plan
from mmtune.training.tree_batch import TreeCollator

WORDS = ("cat", "dog", "left", "picture", "hello world", "three of them")


@pytest.fixture
def split(tiny_family: Any, media: Any, served: Any) -> tuple[Any, pa.Table]:
    """Nine groups of one to four questions, most with a picture, as a table in two chunks."""
    family = tiny_family("qwen3_vl")
    trees = []
    for number in range(9):
        made, real = media.image(40 + 20 * number, 50)
        served[made.path] = real["image"]
        shown = [made] if number % 4 else []
        rows = [
            family.renderer.encode(
                [
                    Message("user", (*shown, TextPart(f"Is the {WORDS[(number + k) % 6]} red?"))),
                    Message("assistant", (TextPart(WORDS[k]),)),
                ]
            )
            for k in range(1 + number % 4)
        ]
        trees += build_trees(rows, [f"{number}/{k}" for k in range(len(rows))], 4096)
    halves = [pa.Table.from_pylist([tree_to_row(t) for t in part], TREE_SCHEMA) for part in (trees[:4], trees[4:])]
    return family, pa.concat_tables(halves)


def test_an_epoch(split: Any) -> None:
    family, table = split
    collate = Collator(family.processor, media_root=Path())
    rows, lengths = RowBatches(Trees(table), row_sizes(table)[1], collate), tree_lengths(table)
    capacity = int(lengths.tokens.max()) + 20
    packing = Packing(tree_costs(lengths, capacity), lengths, capacity, seed=5)
    packed = PackedBatches(rows.source, packing, TreeCollator(collate, rope_index(family.model)))
    batch_tokens = 2 * capacity
    whole = partial(packing.epoch_batches, batch_tokens=batch_tokens)
    sizes = tree_sizes(table)
    plan = Plan(sizes, 5, batch_tokens, None, 1, 1.0, packed=whole)
    batches = plan.epoch_batches(0)
    assert 1 < len(batches) < table.num_rows
    assert sorted(np.concatenate(batches).tolist()) == list(range(table.num_rows))
    rules = mask_rules(family.model)
    total = labels = 0.0
    for chosen in batches:
        batch = packed.batch(chosen)
        assert batch["input_ids"].numel() <= batch_tokens
        loss, count = answer_loss(family.model, batch, rules)
        assert count == plan.targets([chosen])
        total, labels = total + float(loss.detach()), labels + count
    apart, expected = answer_loss(family.model, rows.batch(range(len(rows.at))))
    assert labels == expected
    assert total == pytest.approx(float(apart.detach()), rel=1e-5)


def test_an_image_changes_for_all_its_questions_alike(split: Any) -> None:
    family, table = split
    collate = Collator(family.processor, media_root=Path(), augment=Augmentation(0, 0.3, ("vertical",)))
    source, lengths = Trees(table), tree_lengths(table)
    capacity = int(lengths.tokens.max())
    packing = Packing(tree_costs(lengths, capacity), lengths, capacity, seed=5)
    rows = RowBatches(source, row_sizes(table)[1], collate)
    packed = PackedBatches(source, packing, TreeCollator(collate, rope_index(family.model)))
    rules = mask_rules(family.model)
    losses = {}
    for step in (None, 0, 1):
        together = answer_loss(family.model, packed.batch([1, 2], step), rules)[0]
        apart = answer_loss(family.model, rows.batch(np.flatnonzero(np.isin(rows.at[:, 0], [1, 2])), step))[0]
        assert float(together.detach()) == pytest.approx(float(apart.detach()), rel=1e-5)
        losses[step] = float(together.detach())
    assert len(set(losses.values())) == 3


def test_the_batch_travels_to_loader_processes(split: Any) -> None:
    import pickle

    family, table = split
    collate = TreeCollator(Collator(family.processor, media_root=Path()), rope_index(family.model))
    again = pickle.loads(pickle.dumps(collate.rope))
    trees = Trees(table).trees([1, 2])
    expected = collate([trees])
    found = TreeCollator(collate.collate, again)([trees])
    assert len(pickle.dumps(collate.rope)) < 50_000, "weights do not travel"
    assert (found["position_ids"] == expected["position_ids"]).all()


def test_rows_apart_are_the_rows_of_the_trees(split: Any) -> None:
    family, table = split
    trees, (sizes, at) = Trees(table), row_sizes(table)
    rows = RowBatches(trees, at, Collator(family.processor, media_root=Path()))
    expected = [row for tree in trees.trees(range(table.num_rows)) for row in tree_rows(tree)]
    numbers = np.random.default_rng(0).permutation(len(expected))
    found = rows.encoded(numbers)
    assert all(np.array_equal(a.input_ids, expected[n].input_ids) for a, n in zip(found, numbers, strict=True))
    assert [expected[n].media for n in numbers] == [row.media for row in found]
    assert sizes.rows.tolist() == [1] * len(expected)
    assert sizes.tokens.tolist() == [row.input_ids.size for row in expected]
    assert sizes.targets.tolist() == [int((row.labels != -100).sum()) for row in expected]
    ids = [name for tree in range(table.num_rows) for name in trees.ids(tree)]
    assert rows.ids(numbers) == [ids[n] for n in numbers]
    assert rows.modalities([0]) == set() and rows.modalities(range(len(at))) == {"image"}


def test_separate_rows_keep_the_limits_of_a_batch_whatever_the_trees(split: Any) -> None:
    family, table = split
    course = {"seed": 0, "batch_tokens": 10**6, "batch_rows": 2, "micro_batches": 1, "epochs": 1.0}
    apart = rows_apart(Split(table, Collator(family.processor, media_root=Path())), course)
    assert max(tree_lengths(table).rows) > 2
    for chosen in apart.plan.epoch_batches(0):
        assert apart.batches.batch(chosen)["input_ids"].shape[0] <= 2


@pytest.mark.parametrize("limit", [1, 4, 9, 100])
def test_a_limit_counts_rows_and_cuts_trees(split: Any, limit: int) -> None:
    _, table = split
    whole, small = Trees(table), some_rows(table, limit)
    rows = {}
    for number in range(table.num_rows):
        rows |= dict(zip(whole.ids(number), tree_rows(whole.trees([number])[0]), strict=True))
    kept = {}
    for number in range(small.num_rows):
        kept |= dict(zip(Trees(small).ids(number), tree_rows(Trees(small).trees([number])[0]), strict=True))
    assert len(kept) == min(limit, len(rows))
    for name, row in kept.items():
        assert np.array_equal(row.input_ids, rows[name].input_ids) and row.media == rows[name].media
        assert np.array_equal(row.labels, rows[name].labels)
    assert len(Trees(small).ids(0)) >= 1 and small.schema == table.schema


def test_media_tokens_of_rows_and_trees(tree_table: pa.Table) -> None:
    """A row has the media of its prefix and its own; a tree has each medium once."""
    for table, trees, rows in ((tree_table, [3, 0, 0], [3, 2, 0, 0, 0]), (tree_table.slice(1), [0, 0], [0, 0, 0])):
        sizes, _ = row_sizes(table)
        assert tree_sizes(table).media.tolist() == tree_lengths(table).media.tolist() == trees
        assert tree_sizes(table).tokens.tolist() == tree_lengths(table).tokens.tolist()
        assert sizes.media.tolist() == rows


@pytest.mark.parametrize("packed", [True, False])
def test_a_media_budget_is_kept_by_trees_and_by_rows(split: Any, packed: bool) -> None:
    family, table = split
    whole = Split(table, Collator(family.processor, media_root=Path()))
    course = {"seed": 0, "batch_tokens": 10**6, "batch_rows": None, "micro_batches": 1, "epochs": 1.0}
    most = int(tree_sizes(table).media.max()) + 3

    def batches(budget: int | None) -> list[np.ndarray]:
        own = course | {"batch_media_tokens": budget}
        batching = packed_trees(family.model, whole, own) if packed else rows_apart(whole, own)
        made = batching.plan.epoch_batches(0)
        units = table.num_rows if packed else len(row_sizes(table)[1])
        assert sorted(np.concatenate(made).tolist()) == list(range(units))
        if budget is not None:
            assert all(batching.plan.media(chosen) <= budget for chosen in made)
            seen = [batching.batches.batch(chosen)["input_ids"] for chosen in made]
            assert max(int((ids == family.processor.image_token_id).sum()) for ids in seen) <= budget
        return made

    assert len(batches(most)) > len(batches(None)) == 1
