"""A history stands as one token for each item that is read; what is left out is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmtune.encoding.collate import Collator
from mmtune.encoding.histories import history_counts
from mmtune.encoding.refused import Refused
from mmtune.encoding.tree import build_trees, row_to_tree, tree_rows, tree_to_row
from mmtune.models.inputs import FIRST_ITEM, NO_ITEM, PADDING, UNKNOWN_ITEM
from mmtune.records import Message, TextPart, history


def encoded(family: Any, *histories: tuple[str, ...], question: str = "Will they like it?") -> Any:
    shown = tuple(history(items) for items in histories)
    return family.renderer.encode(
        [Message("user", (*shown, TextPart(question))), Message("assistant", (TextPart("yes"),))]
    )


@pytest.mark.parametrize(("count", "tokens"), [(0, 1), (1, 1), (4, 4), (5, 5), (6, 5), (40, 5)])
def test_a_token_for_each_of_the_newest_items(count: int, tokens: int, family_of: Any) -> None:
    family = family_of("composite")
    items = tuple(str(number % 9) for number in range(count))
    row = encoded(family, items)
    (span,) = row.media
    assert span.length == tokens and span.medium == history(items)
    assert (row.input_ids[span.start : span.start + tokens] == family.processor.behaviour_token_id).all()
    assert (row.input_ids == family.processor.behaviour_token_id).sum() == tokens
    ids = Collator(family.processor, media_root=Path())([row])["history_ids"]
    assert ids.tolist() == [[FIRST_ITEM + int(item) for item in items[-5:]] or [NO_ITEM]]


def test_a_resampled_history_takes_as_many_as_any_other(family_of: Any) -> None:
    row = encoded(family_of("composite_queries"), ("1",), ("1", "2", "3", "4", "5", "6"))
    assert [span.length for span in row.media] == [4, 4]


def test_histories_of_a_batch_are_padded_in_order(family_of: Any) -> None:
    family = family_of("composite")
    rows = [encoded(family, ("1", "new"), ()), encoded(family, ("8", "7", "6"))]
    ids = Collator(family.processor, media_root=Path())(rows)["history_ids"]
    first = [FIRST_ITEM + 1, UNKNOWN_ITEM, PADDING]
    assert ids.tolist() == [first, [NO_ITEM, PADDING, PADDING], [FIRST_ITEM + item for item in (8, 7, 6)]]
    assert ids.dtype == torch.int64


def test_what_is_left_out_is_counted(family_of: Any) -> None:
    processor = family_of("composite").processor
    row = encoded(family_of("composite"), ("new", "1", "2", "new", "4", "5"), ("new",), ())
    assert history_counts(processor, row.media) == {"histories_shortened": 1, "items_read": 6, "items_unknown": 2}
    assert not history_counts(processor, encoded(family_of("composite")).media)


def test_a_shared_history_stands_once_and_comes_back_from_disk(family_of: Any) -> None:
    family = family_of("composite")
    rows = [encoded(family, ("1", "2", "3"), question=text) for text in ("Will they?", "Would they?", "Do they?")]
    (tree,) = build_trees(rows, ["a", "b", "c"], 4096)
    again = row_to_tree(tree_to_row(tree))
    assert (tree.input_ids == family.processor.behaviour_token_id).sum() == 3 and again.media == tree.media
    for found, row in zip(tree_rows(again), rows, strict=True):
        assert np.array_equal(found.input_ids, row.input_ids) and found.media == row.media
    others = [encoded(family, items) for items in (("1", "2", "3"), ("1", "2", "4"))]
    (tree,) = build_trees(others, ["a", "b"], 4096)
    assert (tree.input_ids == family.processor.behaviour_token_id).sum() == 6


def test_the_words_of_a_user_are_no_history(family_of: Any) -> None:
    family = family_of("composite")
    row = encoded(family, ("1",), question="<behaviour> Will they?")
    assert (row.input_ids == family.processor.behaviour_token_id).sum() == 1


@pytest.mark.parametrize("name", ["llava_bytes", "composite_whisper", "text_llama3"])
def test_a_model_without_behaviour_refuses_histories_by_name(name: str, family_of: Any) -> None:
    with pytest.raises(Refused, match="takes no behaviour") as refused:
        encoded(family_of(name), ("1",))
    assert refused.value.reason == "modality_unsupported"
