"""The instruction's embedding, and the loss as a sum over tasks.

Shapes: B rows, T tokens, H width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def instruction_embedding(embeddings_BTH: torch.Tensor, span_BT: torch.Tensor) -> torch.Tensor:
    """Returns ``e_i``, ``(B, H)``: the mean embedding over the instruction's tokens, zero for an empty span.

    Args:
        embeddings_BTH: Input embeddings of the language model, or its hidden states.
        span_BT: True at the tokens of the instruction.
    """
    weights = span_BT.to(embeddings_BTH.dtype)
    total = torch.einsum("bt,bth->bh", weights, embeddings_BTH)
    return total / weights.sum(1, keepdim=True).clamp(min=1)


def task_losses(loss_B: torch.Tensor, task_B: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Returns the summed loss of every task that occurs, by name; together they are ``loss_B.sum()``.

    Args:
        loss_B: Loss per row, or per token.
        task_B: Index into ``names``, of the same shape.
        names: Of all tasks.
    """
    return {name: loss_B[task_B == index].sum() for index, name in enumerate(names) if bool((task_B == index).any())}
