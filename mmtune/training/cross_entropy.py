"""Cross-entropy in fp32, of which logits of a part of the tokens stand at a time.

Where the head is at hand as well, logits are made part by part: never N x V. A head that trains makes those of a part
again in the backward pass. Of one that is frozen, the gradient of its input is all that the backward pass needs, and it
is made at once: the products are those of the whole, none twice (as in Liger's fused loss, arXiv:2410.10989).

Shapes: N label tokens, of which n in a part; H what the head takes, V vocabulary; X either.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_MOST_LOGITS = 1 << 24
"""That stand in fp32 at once (64 MiB)."""


def in_parts(tokens: int, vocabulary: int) -> bool:
    """Says whether the logits of so many tokens are too many to stand at once."""
    return tokens > _tokens_of_part(vocabulary)


def cross_entropy(
    made_NX: torch.Tensor, targets_N: torch.Tensor, reduction: str = "sum", head: nn.Module | None = None
) -> torch.Tensor:
    """Returns the sum of ``-log p(target)`` in fp32, or each by ``none``.

    Args:
        made_NX: ``(N, V)`` logits, or with ``head`` the ``(N, H)`` that it takes.
        targets_N: The labels.
        reduction: ``sum`` or ``none``.
        head: Makes ``(1, n, V)`` logits of ``(1, n, H)``.
    """
    vocabulary: Any = made_NX.shape[-1] if head is None else head.out_features
    of_part = partial(_of_part, head=head, reduction=reduction)
    if not in_parts(len(made_NX), vocabulary):
        return of_part(made_NX, targets_N)
    size = _tokens_of_part(vocabulary)
    if head is not None and made_NX.requires_grad and not any(part.requires_grad for part in head.parameters()):
        losses_N: torch.Tensor = _OfFrozenHead.apply(made_NX, targets_N, head, size)
        return losses_N if reduction == "none" else losses_N.sum()
    parts = zip(made_NX.split(size), targets_N.split(size), strict=True)
    made = [checkpoint(of_part, *part, use_reentrant=False) for part in parts]
    return torch.cat(made) if reduction == "none" else torch.stack(made).sum()


def _tokens_of_part(vocabulary: int) -> int:
    return max(_MOST_LOGITS // max(vocabulary, 1), 1)


def _of_part(made_nX: torch.Tensor, targets_n: torch.Tensor, head: nn.Module | None, reduction: str) -> torch.Tensor:
    logits_nV = made_nX if head is None else head(made_nX[None])[0]
    return functional.cross_entropy(logits_nV.float(), targets_n, reduction=reduction)


class _OfFrozenHead(torch.autograd.Function):
    """What each token loses, with the gradient of what the head takes made at once."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: torch.Tensor, targets_N: torch.Tensor, head: nn.Module, size: int) -> torch.Tensor:
        losses, gradients = [], []
        for part_nH, targets_n in zip(hidden_NH.split(size), targets_N.split(size), strict=True):
            with torch.enable_grad():
                own_nH = part_nH.detach().requires_grad_()
                losses_n = _of_part(own_nH, targets_n, head, "none")
                (gradient,) = torch.autograd.grad(losses_n.sum(), own_nH)
            losses.append(losses_n.detach())
            gradients.append(gradient)
            # Or the part's logits would stand beside the next one's.
            del losses_n
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient_NH,) = ctx.saved_tensors
        return (gradient_NH * grad_N[:, None]).to(gradient_NH.dtype), None, None, None
