"""When something was: frames of a clip in seconds.

Shapes: B rows, F frames, H width.
"""

from __future__ import annotations

import math

import torch
from torch import nn

SHORTEST_SECONDS = 0.1
LONGEST_SECONDS = 1000.0


def sinusoids(positions: torch.Tensor, width: int, *, shortest: float, longest: float) -> torch.Tensor:
    """Returns sines then cosines of positions in fp32, ``(..., width)``; wavelengths from shortest to longest.

    The positions of Vaswani et al. 2017, at real numbers and with wavelengths in the positions' own unit. An odd width
    lacks the last cosine.
    """
    steps = torch.linspace(0.0, 1.0, (width + 1) // 2, device=positions.device)
    wavelengths = shortest * (longest / shortest) ** steps
    angles = positions.float()[..., None] * (2 * math.pi / wavelengths)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)[..., :width]


def time_waves(seconds: torch.Tensor, width: int) -> torch.Tensor:
    """Returns the sinusoids of seconds ``(..., width)`` by which every model here tells when a frame is shown."""
    return sinusoids(seconds, width, shortest=SHORTEST_SECONDS, longest=LONGEST_SECONDS)


class TimePositions(nn.Module):
    """What is added to every token of a frame for the second at which it was taken.

    Seconds and not frame numbers: clips of any rate, sampled anyhow, agree on what 2 s is.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.linear.weight, std=0.02)

    def forward(self, seconds_BF: torch.Tensor) -> torch.Tensor:
        """Returns ``(B, F, H)`` for times in seconds from the start of the clip."""
        return self.linear(time_waves(seconds_BF, self.linear.in_features).to(self.linear.weight.dtype))
