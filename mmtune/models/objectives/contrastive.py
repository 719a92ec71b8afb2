"""Contrast: the two sides of a pair find each other among all of the batch.

Shapes: B rows, D width of the pooled vectors.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional


def contrastive_loss(
    one_BD: torch.Tensor, other_BD: torch.Tensor, scale: torch.Tensor | float, same_BB: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the symmetric InfoNCE loss of CLIP (Radford et al. 2021), a scalar in fp32.

    Args:
        one_BD: Vectors of one modality; row i belongs to row i of ``other_BD``.
        other_BD: Vectors of the other modality.
        scale: Factor on the cosines, the inverse of the temperature.
        same_BB: Bool, symmetric: two rows share the medium or the text, and so are not each other's negatives. What a
            third row has in common with both changes nothing.
    """
    one, other = functional.normalize(one_BD.float(), dim=-1), functional.normalize(other_BD.float(), dim=-1)
    logits_BB = scale * (one @ other.T)
    rows = torch.arange(logits_BB.shape[0], device=logits_BB.device)
    if same_BB is not None:
        logits_BB = logits_BB.masked_fill(same_BB & (rows[:, None] != rows[None]), -torch.inf)
    return (functional.cross_entropy(logits_BB, rows) + functional.cross_entropy(logits_BB.T, rows)) / 2


class Temperature(nn.Module):
    """The learned scale of the cosines: starts at 1 / 0.07, stays at 100 or under, as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the temperature to 0.07."""
        nn.init.constant_(self.logit_scale, math.log(1 / 0.07))

    def forward(self) -> torch.Tensor:
        """Returns the scale, a scalar."""
        return self.logit_scale.exp().clamp(max=100.0)
