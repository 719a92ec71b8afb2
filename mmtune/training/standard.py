"""Numbers less what they are for all rows, over what they differ by from row to row.

Fresh towers say nearly the same of every row: the mean of their features is a hundred times what differs, and it
moves as they train. A code made of features as they are is a constant, and a discriminator has nothing to see.

Shapes: B rows, N rows that have the part, D numbers of a row.
"""

from __future__ import annotations

import torch
from torch import nn

_LEAST = 0.1
"""Numbers that vary less than this share of the mean deviation are not blown up."""


class Standard(nn.Module):
    """Mean and deviation of some first rows.

    Attributes:
        mean: ``(D,)``.
        deviation: ``(D,)``.
        spread: Mean square of those rows' standardised numbers: 1 less what hardly varies.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean: torch.Tensor
        self.deviation: torch.Tensor
        self.spread: torch.Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.register_buffer("spread", torch.ones(()))

    def measure(self, values_ND: torch.Tensor) -> None:
        """Takes mean and deviation of some rows."""
        mean, deviation = _moments(values_ND)
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)
        self.spread.copy_(self(values_ND).square().mean().clamp(min=1e-6))

    def forward(self, values_BD: torch.Tensor) -> torch.Tensor:
        """Returns rows by the standard of the first ones, ``(B, D)``."""
        return (values_BD - self.mean) / self.deviation

    def of_batch(self, values_BD: torch.Tensor, here_B: torch.Tensor) -> torch.Tensor:
        """Returns rows by the standard of their own batch, as batch normalisation in the heads of SimCLR does.

        Args:
            values_BD: Features of a tower that trains, whose first rows tell nothing of later ones.
            here_B: Which rows have them; with one alone, it is the first rows' standard.
        """
        if int(here_B.sum()) < 2:
            return self(values_BD)
        mean, deviation = _moments(values_BD[here_B])
        return (values_BD - mean) / deviation


def _moments(values_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # The gradient of a root is endless at 0.
    deviation = (values_ND.var(0, correction=0) + 1e-12).sqrt()
    return values_ND.mean(0), deviation.clamp(min=max(float(_LEAST * deviation.detach().mean()), 1e-6))
