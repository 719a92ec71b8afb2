"""Where a row of packed trees is cut for attention: by trees, and a tree into its prefix and groups of branches.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from mmtune.models.segments import Piece, Span

_WORTH = 8192
"""Products of a query and a key that a cut must save: about what one more call costs, forward and backward."""


def pieces_of(layout: np.ndarray) -> tuple[tuple[Piece, ...], ...]:
    """Returns the pieces of every row; empty where cutting saves too little, or virtual tokens stand before a row.

    Args:
        layout: ``(4, B, T)`` as for ``tree_mask.dense_mask``.
    """
    tree_BT, branch_BT, _, image_BT = layout
    if (tree_BT < -1).any():
        return ()
    found = tuple(_row(*row) for row in zip(tree_BT, branch_BT, image_BT, strict=True))
    saved = tree_BT.size * tree_BT.shape[1] - sum(piece.products for own in found for piece in own)
    return found if saved >= _WORTH * max(sum(map(len, found)) - 1, 1) else ()


def _row(tree_T: np.ndarray, branch_T: np.ndarray, image_T: np.ndarray) -> tuple[Piece, ...]:
    # Padding stands last and sees itself: one more branch of the last tree.
    tree_T, branch_T = np.maximum.accumulate(tree_T), np.where(tree_T < 0, -1, branch_T)
    pieces: list[Piece] = []
    for members in _groups(_runs(tree_T, 0)):
        start, end = members[0][0], members[-1][1]
        whole = Piece((start, end), ((start, end),))
        pieces += _tree(whole, branch_T, image_T) if len(members) == 1 else [whole]
    return tuple(pieces)


def _tree(whole: Piece, branch_T: np.ndarray, image_T: np.ndarray) -> list[Piece]:
    """Returns a tree cut into its prefix and groups of branches, or whole where that saves too little."""
    start, end = whole.queries
    prefix = start + int((branch_T[start:end] == 0).sum())
    causal = bool((image_T[start:prefix] < 0).all())
    pieces = [Piece((start, prefix), ((start, prefix),), causal)] if prefix > start else []
    for members in _groups(_runs(branch_T[prefix:end], prefix)):
        first, last = members[0][0], members[-1][1]
        # The first group stands right behind its prefix: one span.
        keys = ((start, last),) if first == prefix else ((start, prefix), (first, last))
        pieces.append(Piece((first, last), keys if prefix > start else ((first, last),)))
    saved = whole.products - sum(piece.products for piece in pieces)
    return pieces if saved >= _WORTH * max(len(pieces) - 1, 1) else [whole]


def _runs(numbers: np.ndarray, first: int) -> list[Span]:
    """Returns the spans of equal numbers, counted from ``first``."""
    if not numbers.size:
        return []
    cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), numbers.size]
    return [(first + start, first + end) for start, end in pairwise(cuts)]


def _groups(spans: Iterable[Span]) -> list[list[Span]]:
    """Returns neighbours in groups: short ones stay together, as what that wastes costs less than one more call."""
    groups: list[list[Span]] = []
    for span in spans:
        if groups and 2 * (groups[-1][-1][1] - groups[-1][0][0]) * (span[1] - span[0]) < _WORTH:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups
