"""Packed trees to one batch of tensors, in which every shared prefix stands once.

Shapes: B rows (bins of trees), T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mmtune.encoding.collate import Collator
from mmtune.encoding.render import IGNORED, EncodedRow
from mmtune.encoding.tree import Tree, tree_rows
from mmtune.models.rope_index import RopeIndex
from mmtune.training.tree_blocks import flex_parts

LAYOUT = ("tree", "branch", "place", "block")
"""What the rows of a batch's ``layout`` hold; see ``tree_mask.sees``."""


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
        shown = rows if self.collate.media_by_row else [own for trees in bins for own in _conversations(trees)]
        media = self.collate.media(shown, step)
        types = batch.pop("token_type_ids", None)
        layout = packed_layout(bins, batch["input_ids"].shape[1], None if types is None else types.numpy())
        batch["next_labels"] = batch.pop("labels")
        if "prompt_mask" in batch:
            batch["prompt_mask"] = _prompt_mask(bins, batch["input_ids"].shape[1])
        if self.collate.user_turns is not None:
            batch["user_turns"] = _user_turns(bins, batch["input_ids"].shape[1], self.collate.user_turns)
        batch |= {"layout": torch.from_numpy(layout), **media}
        batch["position_ids"] = self._positions(bins, layout[2], batch)
        if self.flex_windows:
            batch |= flex_parts(layout, self.flex_windows)
        return batch

    def _positions(
        self, bins: Sequence[Sequence[Tree]], place_BT: np.ndarray, batch: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        types_BT = batch.pop("mm_token_type_ids", None)
        positions = torch.from_numpy(place_BT.astype(np.int64))
        grids = batch.get("image_grid_thw")
        if self.rope is None or grids is None:
            return positions
        masks = batch.get("feature_attention_mask")
        sounds = None if masks is None else masks.sum(-1)
        positions = positions.repeat(3, 1, 1)
        images = heard = 0
        for row, trees in enumerate(bins):
            at = 0
            for tree in trees:
                audio = np.array([span.medium.modality == "audio" for span in tree.media], dtype=bool)
                number = np.where(audio, heard + np.cumsum(audio) - 1, images + np.cumsum(~audio) - 1)
                images, heard = images + int((~audio).sum()), heard + int(audio.sum())
                size = tree.input_ids.size
                types = None if types_BT is None else types_BT[row, at : at + size]
                positions[:, row, at : at + size] = _tree_positions(
                    self.rope, tree, types, grids, sounds, audio, number
                )
                at += size
        return positions


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


def _conversations(trees: Sequence[Tree]) -> Iterator[EncodedRow]:
    """Yields rows with the media of each conversation, every medium once.

    Some families cut an image that is alone in its conversation into tiles, so the media are
    kept apart as they are in the separate rows. Where branches share a medium, either all of
    them show others too or none does, or the shared tokens would differ.
    """
    for tree in trees:
        shared = any(tree.branch[span.start] == 0 for span in tree.media)
        yield from [EncodedRow(tree.input_ids, tree.labels, tree.media)] if shared else tree_rows(tree)


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
            layout[2, row, own] = _places(tree)
            at = own.stop
    if types_BT is not None:
        layout[3] = _blocks(types_BT, layout[0])
    return layout


def _prompt_mask(bins: Sequence[Sequence[Tree]], length: int) -> torch.Tensor:
    """Returns ``(B, T)`` 1 where no answer has begun on a token's path; trees as ``asking_tokens`` gives them."""
    mask = np.zeros((len(bins), length), dtype=np.int64)
    for row, trees in enumerate(bins):
        at = 0
        for tree in trees:
            asks = (tree.labels != IGNORED).astype(np.int64)
            for branch in range(len(tree.example_ids) + 1):
                inside = np.flatnonzero(tree.branch == branch)
                # The token that asks for the first label is the last of the prompt.
                mask[row, at + inside] = np.cumsum(asks[inside]) - asks[inside] == 0
            at += tree.input_ids.size
    return torch.from_numpy(mask)


def _user_turns(
    bins: Sequence[Sequence[Tree]], length: int, turns_of: Callable[[np.ndarray], np.ndarray]
) -> torch.Tensor:
    """Returns ``(B, T)`` what ``turns_of`` says of every token along the path of its branch; 0 at padding."""
    turns = np.zeros((len(bins), length), dtype=np.int64)
    for row, trees in enumerate(bins):
        at = 0
        for tree in trees:
            for branch in range(1, len(tree.example_ids) + 1):
                path = np.flatnonzero((tree.branch == 0) | (tree.branch == branch))
                turns[row, at + path] = turns_of(tree.input_ids[path])
            at += tree.input_ids.size
    return torch.from_numpy(turns)


def _places(tree: Tree) -> np.ndarray:
    """Returns ``(T,)`` each token's place on the path from the start of the prefix."""
    starts = np.searchsorted(tree.branch, np.arange(len(tree.example_ids) + 1))
    shift = starts - (tree.branch == 0).sum()
    shift[0] = 0
    return np.arange(tree.input_ids.size) - shift[tree.branch]


def _blocks(types_BT: np.ndarray, tree_BT: np.ndarray) -> np.ndarray:
    """Returns ``(B, T)`` a number for each run of image tokens, -1 elsewhere."""
    image = (types_BT == 1) & (tree_BT >= 0)
    starts = image & ~np.pad(image, ((0, 0), (1, 0)))[:, :-1]
    return np.where(image, np.cumsum(starts, axis=1) - 1, -1)


def _tree_positions(
    rope: RopeIndex,
    tree: Tree,
    types: torch.Tensor | None,
    grids: torch.Tensor,
    sounds: torch.Tensor | None,
    audio: np.ndarray,
    number: np.ndarray,
) -> torch.Tensor:
    """Returns the ``(3, T)`` positions of a tree: those of its separate rows.

    The family is asked for the first path and for paths with media of their own; any other
    branch counts on from where the prefix ends.

    Args:
        rope: The family's positions.
        tree: The tree.
        types: ``(T,)`` token types, where the family has them.
        grids: ``(N, 3)`` of all images of the batch.
        sounds: ``(M,)`` lengths of all sounds of the batch.
        audio: Per medium of the tree: whether it is a sound.
        number: Per medium of the tree: its number among the batch's images or sounds.
    """
    ids = torch.from_numpy(tree.input_ids.astype(np.int64))
    home = np.array([tree.branch[span.start] for span in tree.media], dtype=np.int64)
    branch = torch.from_numpy(tree.branch.astype(np.int64))
    prefix = int((tree.branch == 0).sum())
    found = torch.zeros(3, ids.numel(), dtype=torch.int64)
    for k in range(1, len(tree.example_ids) + 1):
        own = branch == k
        if k > 1 and not (home == k).any():
            found[:, own] = found[:, prefix, None] + torch.arange(int(own.sum()))
            continue
        path = own | (branch == 0)
        on_path = (home == 0) | (home == k)
        facts = {"mm_token_type_ids": None if types is None else types[None, path]}
        facts["image_grid_thw"] = grids[number[on_path & ~audio]] if (on_path & ~audio).any() else None
        facts["audio_seqlens"] = None if sounds is None else sounds[number[on_path & audio]]
        found[:, path] = rope(ids[path], {name: value for name, value in facts.items() if value is not None})
    return found
