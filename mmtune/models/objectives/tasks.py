"""The loss as a sum over tasks.

Shapes: N label tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def task_losses(loss_N: torch.Tensor, task_N: torch.Tensor, names: Sequence[str]) -> dict[str, tuple[float, int]]:
    """Returns the summed loss and the number of tokens of every task that occurs, by name; the sums are the whole.

    Args:
        loss_N: Loss per token.
        task_N: Index into ``names``.
        names: Of all tasks.
    """
    sums = torch.zeros(len(names), dtype=torch.float64).index_add(0, task_N.cpu(), loss_N.double().cpu()).tolist()
    counts = torch.bincount(task_N.cpu(), minlength=len(names)).tolist()
    return {name: (total, count) for name, total, count in zip(names, sums, counts, strict=True) if count}


def by_task(
    loss_N: torch.Tensor, task_N: torch.Tensor, weights: Mapping[str, float]
) -> tuple[torch.Tensor, list[tuple[dict[str, float], int]]]:
    """Returns the weight of every token's task ``(N,)``, and each task's mean loss to log with its number of tokens.

    Args:
        loss_N: Loss per token.
        task_N: Index into ``weights``.
        weights: Of all tasks by name.
    """
    parts = task_losses(loss_N.detach(), task_N, list(weights))
    said = [({f"loss_task_{name}": total / count}, count) for name, (total, count) in parts.items()]
    return loss_N.new_tensor(list(weights.values()))[task_N], said
