"""Made-up packed trees of words and images, for the tests of masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from mmtune.encoding.tree import Tree
from mmtune.training.tree_batch import packed_layout

IMAGE, WORD = 1, 0


@st.composite
def forests(draw: Any) -> list[list[list[list[int]]]]:
    """Rows of trees; a tree is its prefix and its branches, each a list of token types."""
    types = st.lists(st.sampled_from([WORD, WORD, IMAGE]), min_size=1, max_size=5)

    def tree() -> list[list[int]]:
        prefix = [*draw(types), WORD] if draw(st.booleans()) else []
        # Structure stands around every image, so a branch begins and ends with a word.
        return [prefix, *([WORD, *draw(types), WORD] for _ in range(draw(st.integers(1, 3))))]

    return [[tree() for _ in range(draw(st.integers(1, 3)))] for _ in range(draw(st.integers(1, 2)))]


def layout_of(forest: list[list[list[list[int]]]], multiple_of: int = 1) -> torch.Tensor:
    """The ``(4, B, T)`` layout of rows of trees; two tokens of padding at least."""

    def tree(parts: list[list[int]]) -> Tree:
        branch = np.repeat(np.arange(len(parts)), [len(part) for part in parts]).astype(np.int32)
        names = tuple(str(number) for number in range(len(parts) - 1))
        return Tree(np.zeros_like(branch), np.full_like(branch, -100), branch, (), names, (1.0,) * len(names))

    bins = [[tree(parts) for parts in trees] for trees in forest]
    length = max(sum(item.input_ids.size for item in trees) for trees in bins) + 2
    length = -(-length // multiple_of) * multiple_of
    types = np.zeros((len(bins), length), dtype=np.int64)
    for row, trees in enumerate(forest):
        flat = [kind for parts in trees for part in parts for kind in part]
        types[row, : len(flat)] = flat
    return torch.from_numpy(packed_layout(bins, length, types))
