"""Rotary positions as one operation, on a CPU: the numbers of transformers' own in half the passes over memory.

``x * cos + rotate_half(x) * sin`` is written half by half, and so is its gradient (Su et al. 2021, arXiv:2104.09864,
equation 34, with the two coordinates of a pair half a head apart).

Shapes: B rows, h heads, T tokens, D head width.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_NAME = "apply_rotary_pos_emb"
_PARAMETERS = ["q", "k", "cos", "sin", "unsqueeze_dim"]


class _Rotary(torch.autograd.Function):
    """Queries and keys at once: one node less of the graph."""

    @staticmethod
    def forward(
        ctx: Any, q_BhTD: torch.Tensor, k_BhTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        return tuple(turned(x_BhTD, cos, sin, 1) for x_BhTD in (q_BhTD, k_BhTD))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *(turned(grad_BhTD, cos, sin, -1) for grad_BhTD in grads), None, None


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    """Returns ``(..., D)`` turned by an angle, or back by it where the sign is -1."""
    half = x.shape[-1] // 2
    first, second = (sin[..., :half], sin[..., half:]) if sign > 0 else (sin[..., half:], sin[..., :half])
    made = x * cos
    made[..., :half].addcmul_(x[..., half:], first, value=-sign)
    made[..., half:].addcmul_(x[..., :half], second, value=sign)
    return made


@contextmanager
def fused_rotary(model: nn.Module) -> Iterator[int]:
    """Within this context the layers of a model rotate by one operation; gives how many of its modules' files do.

    The function stands in the file of a family's layers, so it is put back at the end. What computes otherwise than
    Llama's is left as it is; numbers of another type than fp32, or elsewhere than on a CPU, go the family's own way.
    """
    files = [sys.modules[name] for name in sorted({type(module).__module__ for module in model.modules()})]
    fused = {file: getattr(file, _NAME) for file in files if _is_plain(getattr(file, _NAME, None))}
    for file, own in fused.items():
        setattr(file, _NAME, _Fused(own))
    try:
        yield len(fused)
    finally:
        for file, own in fused.items():
            setattr(file, _NAME, own)


class _Fused:
    """Takes the place of a family's function."""

    def __init__(self, own: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._own = own

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        fits = all(x.dtype == torch.float32 and x.device.type == "cpu" for x in (q, k, cos))
        # Some families rotate the first part of a head alone.
        if not fits or cos.requires_grad or not q.shape[-1] == k.shape[-1] == cos.shape[-1]:
            return self._own(q, k, cos, sin, unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        q_turned, k_turned = _Rotary.apply(q, k, cos, sin)
        return q_turned, k_turned


def _is_plain(own: Any) -> bool:
    """Whether a function rotates whole heads by halves, by its parameters and by what it makes of some numbers."""
    if not inspect.isfunction(own) or list(inspect.signature(own).parameters) != _PARAMETERS:
        return False
    q = torch.linspace(-1.0, 1.0, 48).view(1, 2, 3, 8)
    k, cos, sin = (
        q[:, :1] - 0.5,
        torch.linspace(-1.0, 0.5, 24).view(1, 3, 8),
        torch.linspace(0.0, 0.9, 24).view(1, 3, 8),
    )
    found, wanted = _Fused(own)(q, k, cos, sin), own(q, k, cos, sin)
    return all(torch.allclose(one, other, rtol=1e-5, atol=1e-6) for one, other in zip(found, wanted, strict=True))
