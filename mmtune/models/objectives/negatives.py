"""Pairs that do not belong together: for every row another row of its batch.

Shapes: B rows.
"""

from __future__ import annotations

import torch


def other_rows(
    group_B: torch.Tensor, generator: torch.Generator, able_BB: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns for each row a uniformly drawn row of another group, and whether there is one, both ``(B,)``.

    A row without a stranger in its batch is given itself. Groups are media for image-text match, instructions for
    the sensitivity check: the same media under a shuffled instruction must give other answers.

    Args:
        group_B: Integers; rows of one group belong together.
        generator: On the CPU, so every device draws the same.
        able_BB: Bool: which rows may stand for which; None for all.
    """
    stranger_BB = group_B[:, None] != group_B[None]
    if able_BB is not None:
        stranger_BB = stranger_BB & able_BB
    draws_BB = torch.rand(stranger_BB.shape, generator=generator).to(group_B.device)
    found_B = stranger_BB.any(-1)
    drawn_B = draws_BB.masked_fill(~stranger_BB, -1.0).argmax(-1)
    return torch.where(found_B, drawn_B, torch.arange(len(group_B), device=group_B.device)), found_B
