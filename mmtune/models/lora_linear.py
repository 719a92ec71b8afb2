"""One LoRA layer as one operation: the numbers of PEFT's own forward in fewer passes over memory.

PEFT computes ``base(x) + B(A(x)) * scaling``; the scaled product and the sum are passes over the
whole output, forward and backward. Here scaling and sums happen inside the matrix products.

Shapes: T tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from mmtune.models.products import times


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        a_rI: torch.Tensor,
        b_Or: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        inner_Tr = x_TI @ a_rI.to(x.dtype).T
        y_TO = times(x_TI, weight_OI, bias_O).addmm_(inner_Tr, b_Or.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(x_TI, weight_OI, a_rI, b_Or, inner_Tr)
        ctx.scaling = scaling
        return y_TO.view(*x.shape[:-1], weight_OI.shape[0]).data

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TI, weight_OI, a_rI, b_Or, inner_Tr = ctx.saved_tensors
        grad_TO = grad.reshape(-1, grad.shape[-1])
        a, b, scaling = a_rI.to(grad.dtype), b_Or.to(grad.dtype), ctx.scaling
        # Few rows are multiplied up to four times faster than few columns.
        inner_grad_rT = b.T @ grad_TO.T
        # With beta 0 the first argument gives its shape alone.
        a_grad = torch.addmm(a, inner_grad_rT, x_TI, beta=0, alpha=scaling).to(a_rI.dtype)
        b_grad = (inner_Tr.T @ grad_TO).mul_(scaling).T.to(b_Or.dtype, memory_format=torch.contiguous_format)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = times(grad_TO, weight_OI.t()).addmm_(inner_grad_rT.T, a, alpha=scaling).view(*grad.shape[:-1], -1)
        return x_grad, None, None, a_grad, b_grad, None


def fuse_lora(model: nn.Module) -> int:
    """Gives every plain LoRA layer the fused forward, in place; returns how many there are.

    Left as they are: layers with dropout, DoRA or quantized weights, and weights that train
    themselves. While a layer is merged or its adapter is off, PEFT's own forward is used.
    """
    from peft.tuners.lora.layer import Linear

    fused = 0
    for module in model.modules():
        if type(module) is Linear and _is_plain(module):
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]
            fused += 1
    return fused


def _is_plain(layer: Any) -> bool:
    base = layer.base_layer
    return (
        type(base) is nn.Linear
        and not base.weight.requires_grad
        and not layer.lora_variant
        and list(layer.lora_A) == ["default"]
        and all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
        and layer.lora_A["default"].bias is None
        and layer.lora_B["default"].bias is None
        and not layer.fan_in_fan_out
    )


def adapts(module: Any) -> bool:
    """Says whether a module is a LoRA layer with the fused forward whose adapter counts at the moment."""
    own = getattr(vars(module).get("forward"), "__func__", None)
    return own is _forward and not module.disable_adapters and not module.merged


def _forward(layer: Any, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    if args or options or not adapts(layer):
        found: torch.Tensor = type(layer).forward(layer, x, *args, **options)
        return found
    base = layer.base_layer
    weight, bias = base.weight, base.bias
    kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else weight.dtype
    made: torch.Tensor = _LoraLinear.apply(
        x.to(kind),
        weight.to(kind),
        None if bias is None else bias.to(kind),
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        float(layer.scaling["default"]),
    )
    return made
