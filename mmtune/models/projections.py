"""Frozen linear layers of one input with LoRA beside them, multiplied together.

``y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T`` (Hu et al. 2021, arXiv:2106.09685, equation 3): the thin products of all A
are one, forward and backward. A layer without LoRA has rank 0. Thin products are made with the rank as rows: few rows
are multiplied up to four times faster than few columns.

Shapes: N tokens, I inputs, O outputs of a layer; r rank of a layer and R of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from mmtune.models.lora_linear import adapts
from mmtune.models.products import is_worth, times


@dataclass(frozen=True, slots=True)
class Projection:
    """A frozen linear layer, and LoRA beside it.

    Attributes:
        weight_OI: Of the layer.
        bias_O: Of the layer, or None.
        a_rI: LoRA's A.
        b_Or: LoRA's B.
        scaling: Of what LoRA adds.
    """

    weight_OI: torch.Tensor
    bias_O: torch.Tensor | None
    a_rI: torch.Tensor
    b_Or: torch.Tensor
    scaling: float


def projection_of(module: Any) -> Projection | None:
    """Returns what a module computes; None where it is more than a frozen linear layer with or without plain LoRA."""
    if adapts(module):
        base, scaling = module.base_layer, float(module.scaling["default"])
        a_rI, b_Or = module.lora_A["default"].weight, module.lora_B["default"].weight
    elif type(module) is nn.Linear:
        base, scaling = module, 0.0
        a_rI, b_Or = module.weight.new_empty(0, module.in_features), module.weight.new_empty(module.out_features, 0)
    else:
        return None
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return None
    return Projection(base.weight, base.bias, a_rI, b_Or, scaling)


def is_still(module: Any, projection: Projection) -> bool:
    """Says whether ``projection_of`` would return the same for a module; in a tenth of its time."""
    if adapts(module):
        parts = module._modules
        base, a, b = parts["base_layer"], *(parts[name]._modules["default"] for name in ("lora_A", "lora_B"))
        same = a._parameters["weight"] is projection.a_rI and b._parameters["weight"] is projection.b_Or
        if not same or module.scaling["default"] != projection.scaling:
            return False
    elif type(module) is nn.Linear and not projection.scaling:
        base = module
    else:
        return False
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    return weight is projection.weight_OI and bias is projection.bias_O and not trains


@dataclass(frozen=True)
class Fan:
    """Layers of one input.

    Attributes:
        layers: At least one.
    """

    layers: tuple[Projection, ...]

    @cached_property
    def ranks(self) -> list[int]:
        """The rank of every layer."""
        return [len(layer.a_rI) for layer in self.layers]

    @property
    def all_a_RI(self) -> torch.Tensor:
        """All A below one another."""
        return self.layers[0].a_rI if len(self.layers) == 1 else torch.cat([layer.a_rI for layer in self.layers])

    def project(self, x_NI: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Returns ``(N, O)`` what each layer makes, and ``(R, N)`` the products with all A."""
        inner_RN = torch.mm(self.all_a_RI, x_NI.t())
        made = [
            times(x_NI, layer.weight_OI, layer.bias_O).addmm_(inner_rN.t(), layer.b_Or.t(), alpha=layer.scaling)
            for layer, inner_rN in zip(self.layers, inner_RN.split_with_sizes(self.ranks), strict=True)
        ]
        return made, inner_RN

    def project_back(
        self, grads: Sequence[torch.Tensor], x_NI: torch.Tensor, inner_RN: torch.Tensor, *, wanted: bool = True
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns ``(N, I)`` the gradient of the input, and those of A and B of every layer in turn.

        Args:
            grads: ``(N, O)`` of what each layer made.
            x_NI: The input.
            inner_RN: As ``project`` returned it.
            wanted: The input's gradient is read by someone; else it is what the adapters add to it alone.
        """
        inner_grad_RN, found = torch.empty_like(inner_RN), []
        inner, inner_grads = (value.split_with_sizes(self.ranks) for value in (inner_RN, inner_grad_RN))
        for grad_NO, layer, inner_rN, inner_grad_rN in zip(grads, self.layers, inner, inner_grads, strict=True):
            # With beta 0 the first argument gives its shape alone.
            torch.addmm(inner_grad_rN, layer.b_Or.t(), grad_NO.t(), beta=0, alpha=layer.scaling, out=inner_grad_rN)
            b_grad = grad_NO.new_empty(len(inner_rN), grad_NO.shape[1])
            torch.addmm(b_grad, inner_rN, grad_NO, beta=0, alpha=layer.scaling, out=b_grad)
            found.append(b_grad.t().contiguous())
        a_grads = torch.mm(inner_grad_RN, x_NI).split_with_sizes(self.ranks)
        x_grad = torch.mm(inner_grad_RN.t(), self.all_a_RI)
        if wanted:
            for grad_NO, layer in zip(grads, self.layers, strict=True):
                if is_worth(grad_NO, layer.weight_OI.t()):
                    x_grad.add_(times(grad_NO, layer.weight_OI.t()))
                else:
                    x_grad.addmm_(grad_NO, layer.weight_OI)
        return x_grad, [grad for pair in zip(a_grads, found, strict=True) for grad in pair]
