"""MMBT's single stream (Kiela et al. 2019): media and text in one sequence, told apart by segments.

That its tokens see each other both ways is the mask's part, see ``composite.masks.both_ways``.
Shapes: B rows, T tokens of the whole stream, H width.
"""

from __future__ import annotations

import torch
from torch import nn


class SegmentEmbedding(nn.Module):
    """What is added to a token for its segment: text, image, audio, behaviour; zero at the start.

    A trained language model that gets segments is so at first the same model.
    """

    def __init__(self, segments: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(segments, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets all segments to zero."""
        nn.init.zeros_(self.weight)

    def forward(self, segments_BT: torch.Tensor) -> torch.Tensor:
        """Returns ``(B, T, H)`` for integer segments."""
        return nn.functional.embedding(segments_BT, self.weight)
