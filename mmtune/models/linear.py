"""Linear layers of a model by the products that are fastest on this processor (``products``), forward and backward.

Shapes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mmtune.models.forwards import running_as
from mmtune.models.products import has_wide_products, is_worth, times, times_transposed


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight_OI)
        # As no view, so that what comes after may write into it, as into any layer's output.
        return times(x.reshape(-1, x.shape[-1]), weight_OI, bias_O).view(*x.shape[:-1], -1).data

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        grad_NO, (for_x, for_weight, for_bias) = grad.reshape(-1, grad.shape[-1]), ctx.needs_input_grad
        x_grad = times(grad_NO, weight_OI.t()).view(*grad.shape[:-1], -1) if for_x else None
        weight_grad = times_transposed(grad_NO, x.reshape(-1, x.shape[-1])) if for_weight else None
        return x_grad, weight_grad, grad_NO.sum(0) if for_bias else None


@contextmanager
def fused_linears(model: nn.Module) -> Iterator[int]:
    """Within this context every plain linear layer multiplies by ``products``; gives how many do.

    None does where PyTorch's own products are the fastest. Weights of which processes hold parts are whole while their
    layer runs; one that is called with a part goes PyTorch's own way.
    """
    layers = _plain_layers(model)
    with running_as({layer: MethodType(_forward, layer) for layer in layers}):
        yield len(layers)


def fuse_linears(model: nn.Module) -> int:
    """Lets every plain linear layer of a model multiply by ``products`` from now on; returns how many do."""
    layers: Any = _plain_layers(model)
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    return len(layers)


def _plain_layers(model: nn.Module) -> list[nn.Module]:
    if not has_wide_products():
        return []
    return [own for own in model.modules() if type(own) is nn.Linear and "forward" not in vars(own)]


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    weight, bias = layer.weight, layer.bias
    if isinstance(weight, DTensor) or not is_worth(x, weight) or torch.is_autocast_enabled("cpu"):
        return nn.Linear.forward(layer, x)
    trains = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if trains and torch.is_grad_enabled():
        made: torch.Tensor = _Linear.apply(x, weight, bias)
        return made
    return times(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
