"""RMSNorm as one operation, on a CPU: the numbers of transformers' own in half the passes over memory.

Autograd takes the gradient of every small step of ``x * rsqrt(mean(x^2) + eps) * w``; here the gradient is the closed
form, ``dx = r * (g*w) - x * r^3 * mean(g*w*x)`` with ``r = rsqrt(mean(x^2) + eps)`` (Zhang and Sennrich 2019,
arXiv:1910.07467, equation 4).

Shapes: T tokens, H width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from mmtune.models.forwards import running_as


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_H: torch.Tensor, epsilon: float) -> torch.Tensor:
        x_TH = x.reshape(-1, x.shape[-1])
        made_TH, scale_T1 = normed(x_TH, weight_H, epsilon)
        ctx.save_for_backward(x_TH, weight_H, scale_T1)
        return made_TH.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TH, weight_H, scale_T1 = ctx.saved_tensors
        grad_TH = grad.reshape(x_TH.shape)
        weight_grad = (x_TH * scale_T1).mul_(grad_TH).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, weight_grad, None
        scaled_TH = grad_TH * weight_H
        along_T1 = along(scaled_TH, x_TH, scale_T1)
        return scaled_TH.mul_(scale_T1).addcmul_(x_TH, along_T1).view(grad.shape), weight_grad, None


def normed(x_TH: torch.Tensor, weight_H: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``x * r * w`` and ``(T, 1)`` r, which its gradient needs."""
    norm_T1 = torch.linalg.vector_norm(x_TH, dim=-1, keepdim=True)
    scale_T1 = norm_T1.square_().div_(x_TH.shape[-1]).add_(epsilon).rsqrt_()
    return (x_TH * scale_T1).mul_(weight_H), scale_T1


def along(scaled_TH: torch.Tensor, x_TH: torch.Tensor, scale_T1: torch.Tensor) -> torch.Tensor:
    """Returns ``(T, 1)``, the share of x in its gradient, where ``scaled_TH`` is ``g * w``."""
    along_T1 = (scaled_TH * x_TH).sum(-1, keepdim=True)
    return along_T1.mul_(scale_T1.pow(3)).div_(-x_TH.shape[-1])


@contextmanager
def fused_rms_norms(model: nn.Module) -> Iterator[int]:
    """Within this context every RMSNorm that computes as Llama's does has the fused forward; gives how many there are.

    Numbers of another type than fp32, or elsewhere than on a CPU, go the module's own way.
    """
    fused = [module for module in model.modules() if _is_plain(module)]
    with running_as({module: MethodType(_forward, module) for module in fused}):
        yield len(fused)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is an RMSNorm of a weight alone, by its name and by what it makes of some numbers.

    Its own weight may be spread over processes, and gathered only while it runs.
    """
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(epsilon, float) or "forward" in vars(module):
        return False
    if not isinstance(weight, torch.Tensor) or weight.ndim != 1 or not weight.numel():
        return False
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return False
    width = weight.shape[0]
    with torch.no_grad():
        x_TH, other_H = torch.linspace(-2.0, 3.0, 3 * width).view(3, -1), torch.linspace(0.5, 2.0, width)
        own_TH = functional_call(module, {"weight": other_H}, (x_TH,))
        return torch.allclose(own_TH, _RmsNorm.apply(x_TH, other_H, epsilon), rtol=1e-5, atol=1e-6)


def _forward(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    x, weight = hidden_states, module.weight
    if x.dtype != torch.float32 or x.device.type != "cpu" or isinstance(weight, DTensor):
        found: torch.Tensor = type(module).forward(module, x)
        return found
    made: torch.Tensor = _RmsNorm.apply(x, weight, module.variance_epsilon)
    return made
