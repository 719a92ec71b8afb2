"""Packed trees to one batch of tensors, in which every shared prefix stands once.

Shapes: B rows (bins of trees), T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mmtune.encoding.collate import Collator
from mmtune.encoding.paths import along_paths, image_runs, rope_positions, sharing_conversations
from mmtune.encoding.render import IGNORED, EncodedRow
from mmtune.encoding.tree import Tree
from mmtune.models.rope_index import RopeIndex
from mmtune.training.tree_blocks import flex_parts

LAYOUT = ("tree", "branch", "place", "block")
"""What the rows of a batch's ``layout`` hold; see ``tree_mask.dense_mask``."""


@dataclass(frozen=True)
class TreeCollator:
    """Bins of trees to a batch; picklable for loader processes.

    Attributes:
        collate: Makes the family's tensors of plain rows.
        rope: The family's 3-D positions, or None.
        multiple_of: T is rounded up to a multiple of this; ``tree_blocks.BLOCK`` for FlexAttention.
        flex_windows: For FlexAttention the sliding window of every kind of layer; else empty.
    """

    collate: Collator
    rope: RopeIndex | None = None
    multiple_of: int = 1
    flex_windows: tuple[int | None, ...] = ()

    def __call__(self, bins: Sequence[Sequence[Tree]], step: int | None = None) -> dict[str, torch.Tensor]:
        """Returns what the rows' batch has, with ``position_ids``, ``layout``, and ``next_labels`` for ``labels``.

        ``layout`` is ``(4, B, T)`` int32 (see ``LAYOUT``), for FlexAttention with what ``flex_parts`` makes
        of it; ``next_labels`` ``(B, T)`` is what each token predicts; ``step`` is the training step, for
        images that change while training.

        Raises:
            IntegrityError: A medium now takes another number of tokens than at tokenize time.
        """
        bins = [[asking_tokens(tree) for tree in trees] for trees in bins]
        rows = [_row(trees) for trees in bins]
        batch = self.collate.text(rows, self.multiple_of)
        length = batch["input_ids"].shape[1]
        apart = (own for trees in bins for tree in trees for own in sharing_conversations(tree))
        shown = rows if self.collate.media_by_row else list(apart)
        media = self.collate.media(shown, step)
        types = batch.pop("token_type_ids", None)
        layout = packed_layout(bins, length, None if types is None else types.numpy())
        batch["next_labels"] = batch.pop("labels")
        if "prompt_mask" in batch:
            batch["prompt_mask"] = along_paths(bins, length, _prompt)
        turns_of = self.collate.user_turns
        if turns_of is not None:
            batch["user_turns"] = along_paths(bins, length, lambda tree, path: turns_of(tree.input_ids[path]))
        places = torch.from_numpy(layout[2].astype(np.int64))
        token_types = batch.pop("mm_token_type_ids", None)
        batch |= {"layout": torch.from_numpy(layout), **media}
        batch["position_ids"] = rope_positions(bins, places, self.rope, token_types, batch)
        if self.flex_windows:
            batch |= flex_parts(layout, self.flex_windows)
        return batch


def asking_tokens(tree: Tree) -> Tree:
    """Returns a tree in which each label stands at the token that predicts it, without what comes after the last.

    A branch ends in tokens that are predicted and predict nothing: the last label and what closes its turn.
    Nothing reads what a model makes of them.
    """
    branch, numbers = tree.branch, np.arange(tree.input_ids.size)
    labels = np.full_like(tree.labels, IGNORED)
    # The last token of the prefix predicts no label, see ``encoding.tree.shared_length``.
    inside = np.flatnonzero(branch[1:] == branch[:-1])
    labels[inside] = tree.labels[inside + 1]
    last = np.searchsorted(branch, np.arange(len(tree.example_ids) + 1))
    bears = labels != IGNORED
    np.maximum.at(last, branch[bears], numbers[bears])
    kept = (branch == 0) | (numbers <= last[branch])
    place = np.cumsum(kept) - 1
    media = tuple(replace(span, start=int(place[span.start])) for span in tree.media if kept[span.start])
    return replace(tree, input_ids=tree.input_ids[kept], labels=labels[kept], branch=branch[kept], media=media)


def _row(trees: Sequence[Tree]) -> EncodedRow:
    """Returns trees one after the other as one row."""
    ids, labels, media, at = [], [], [], 0
    for tree in trees:
        ids.append(tree.input_ids)
        labels.append(tree.labels)
        media += [replace(span, start=span.start + at) for span in tree.media]
        at += tree.input_ids.size
    return EncodedRow(np.concatenate(ids), np.concatenate(labels), tuple(media))


def packed_layout(bins: Sequence[Sequence[Tree]], length: int, types_BT: np.ndarray | None) -> np.ndarray:
    """Returns the ``(4, B, T)`` int32 layout of bins; see ``LAYOUT``.

    Args:
        bins: The trees of each row.
        length: T.
        types_BT: 1 at image tokens that see each other both ways; None where a family has none.
    """
    layout = np.zeros((4, len(bins), length), dtype=np.int32)
    layout[0], layout[3] = -1, -1
    for row, trees in enumerate(bins):
        at = 0
        for number, tree in enumerate(trees):
            own = slice(at, at + tree.input_ids.size)
            layout[0, row, own] = number
            layout[1, row, own] = tree.branch
            at = own.stop
    layout[2] = along_paths(bins, length, lambda _, path: np.arange(path.size))
    if types_BT is not None:
        layout[3] = image_runs(types_BT)
    return layout


def _prompt(tree: Tree, path: np.ndarray) -> np.ndarray:
    """Returns 1 where no answer has begun on a path of a tree as ``asking_tokens`` gives it."""
    asks = (tree.labels[path] != IGNORED).astype(np.int64)
    # The token that asks for the first label is the last of the prompt.
    return np.cumsum(asks) - asks == 0
