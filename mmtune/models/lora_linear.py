"""LoRA layers as one operation: the numbers of PEFT's own forward in fewer passes over memory.

PEFT computes ``base(x) + B(A(x)) * scaling``; the scaled product and the sum are passes over the
whole output, forward and backward. Here scaling and sums happen inside the matrix products, and layers
that read one input, such as queries, keys and values, share the thin products with their A.

Shapes: T tokens, I inputs, O outputs, r rank; R the ranks of all layers of an operation.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

# Children of one module that read one input, in the order in which they are called.
_ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))


class _LoraLinears(torch.autograd.Function):
    """``(T, I)`` to ``(T, O)`` of each layer; the weights are those of all layers, then the biases, A and B of all."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scaling: float, *tensors: Any) -> tuple[torch.Tensor, ...]:
        count = len(tensors) // 4
        weights_OI, biases_O, a_rI, b_Or = (tensors[first : first + count] for first in range(0, 4 * count, count))
        x_TI = x.reshape(-1, x.shape[-1])
        a_RI = _joined([a.to(x.dtype) for a in a_rI], 0)
        inner_TR = x_TI @ a_RI.T
        inners_Tr = _parts(inner_TR, [a.shape[0] for a in a_rI], 1)
        ctx.save_for_backward(x_TI, inner_TR, a_RI, *weights_OI, *b_Or)
        ctx.scaling, ctx.kinds = scaling, [parameter.dtype for parameter in (*a_rI, *b_Or)]
        made_TO = (
            functional.linear(x_TI, weight_OI, bias_O).addmm_(inner_Tr, b.to(x.dtype).T, alpha=scaling)
            for weight_OI, bias_O, inner_Tr, b in zip(weights_OI, biases_O, inners_Tr, b_Or, strict=True)
        )
        return tuple(y_TO.view(*x.shape[:-1], y_TO.shape[-1]) for y_TO in made_TO)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TI, inner_TR, a_RI, *rest = ctx.saved_tensors
        count, scaling = len(grads), ctx.scaling
        weights_OI, b_Or = rest[:count], [b.to(x_TI.dtype) for b in rest[count:]]
        ranks = [b.shape[1] for b in b_Or]
        grads_TO = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        inner_grad_TR = _joined([grad_TO @ b for grad_TO, b in zip(grads_TO, b_Or, strict=True)], 1)
        # With beta 0 the first argument gives its shape alone.
        a_grads_rI = _parts(torch.addmm(a_RI, inner_grad_TR.T, x_TI, beta=0, alpha=scaling), ranks, 0)
        b_grads_Or = [
            torch.addmm(b, grad_TO.T, inner_Tr, beta=0, alpha=scaling)
            for b, grad_TO, inner_Tr in zip(b_Or, grads_TO, _parts(inner_TR, ranks, 1), strict=True)
        ]
        found = [grad.to(kind) for grad, kind in zip((*a_grads_rI, *b_grads_Or), ctx.kinds, strict=True)]
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad_TI = grads_TO[0] @ weights_OI[0]
            for grad_TO, weight_OI in zip(grads_TO[1:], weights_OI[1:], strict=True):
                x_grad_TI.addmm_(grad_TO, weight_OI)
            x_grad = x_grad_TI.addmm_(inner_grad_TR, a_RI, alpha=scaling).view(*grads[0].shape[:-1], x_TI.shape[1])
        return x_grad, None, *[None] * (2 * count), *found


def _joined(parts: list[torch.Tensor], along: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, along)


def _parts(joined: torch.Tensor, sizes: list[int], along: int) -> Sequence[torch.Tensor]:
    return (joined,) if len(sizes) == 1 else joined.split_with_sizes(sizes, along)


class _Readers:
    """Plain LoRA layers that read one input: the first that is called computes what the others will ask for.

    Which layers these are is guessed by their names, so each gets what was made for it only where it is called with
    the very tensor that it was made of; layers that read something else are on their own from then on.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers, self._together = layers, True
        self._made: dict[int, torch.Tensor] = {}
        self._source: tuple[torch.Tensor, int] | None = None

    def __call__(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """Returns what the layer of this number makes of ``x``, ``(..., I)`` to ``(..., O)``."""
        made = self._made.pop(number, None)
        if made is not None:
            if self._is_source(x):
                self._source = self._source if self._made else None
                return made
            self._together = False
        layers = [self._layers[number], *self._followers(number)]
        first, *others = _run(layers, x)
        self._made = dict(enumerate(others, start=number + 1))
        self._source = (x, x._version) if others else None
        return first

    def _is_source(self, x: torch.Tensor) -> bool:
        return self._source is not None and self._source[0] is x and self._source[1] == x._version

    def _followers(self, number: int) -> list[Any]:
        """Returns the layers after this one whose input is its own, as far as can be known."""
        if not self._together or not torch.is_grad_enabled() or self._layers[number]._forward_pre_hooks:
            return []
        own = self._layers[number].scaling["default"]
        # A layer may be hooked to read other tokens, and its weights may be gathered only when it runs.
        fit = [
            layer.scaling["default"] == own and not layer._forward_pre_hooks and bool(layer.base_layer.weight.numel())
            for layer in self._layers[number + 1 :]
        ]
        return list(self._layers[number + 1 :]) if all(fit) else []


def fuse_lora(model: nn.Module) -> int:
    """Gives every plain LoRA layer the fused forward, in place; returns how many there are.

    Left as they are: layers with dropout, DoRA or quantized weights, and weights that train
    themselves. While a layer is merged or its adapter is off, PEFT's own forward is used.
    """
    plain = {module: True for module in model.modules() if _is_plain(module)}
    for module in model.modules():
        for layers in _one_input(module, plain):
            _fuse(layers)
            plain |= dict.fromkeys(layers, False)
    for layer in (layer for layer, alone in plain.items() if alone):
        _fuse([layer])
    return len(plain)


def read_apart(model: nn.Module) -> None:
    """Makes every fused layer an operation of its own, in place.

    Autograd hands on the gradients of one operation in no certain order, which may differ between processes; who
    pairs the gradients of processes by that order needs this.
    """
    for layer in model.modules():
        if isinstance(getattr(layer, "readers", None), _Readers):
            _fuse([layer])


def _fuse(layers: Sequence[Any]) -> None:
    readers = _Readers(layers)
    for number, layer in enumerate(layers):
        layer.readers, layer.number_of_reader = readers, number
        layer.forward = MethodType(_forward, layer)


def _one_input(module: nn.Module, plain: Container[Any]) -> Iterator[list[Any]]:
    """Yields the plain LoRA layers below a module that read one input, by their names, widths and types."""
    children = dict(module.named_children())
    for names in _ONE_INPUT:
        layers: list[Any] = [children[name] for name in names if children.get(name) in plain]
        kinds = {(layer.in_features, layer.base_layer.weight.dtype) for layer in layers}
        if len(layers) == len(names) and len(kinds) == 1:
            yield layers


def _is_plain(layer: Any) -> bool:
    from peft.tuners.lora.layer import Linear

    return (
        type(layer) is Linear
        and type(layer.base_layer) is nn.Linear
        and not layer.base_layer.weight.requires_grad
        and not layer.lora_variant
        and list(layer.lora_A) == ["default"]
        and all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
        and layer.lora_A["default"].bias is None
        and layer.lora_B["default"].bias is None
        and not layer.fan_in_fan_out
    )


def _forward(layer: Any, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    if args or options or layer.disable_adapters or layer.merged:
        found: torch.Tensor = type(layer).forward(layer, x, *args, **options)
        return found
    readers: _Readers = layer.readers
    return readers(layer.number_of_reader, x)


def _run(layers: Sequence[Any], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weights = [layer.base_layer.weight for layer in layers]
    device = x.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights[0].dtype
    biases = [layer.base_layer.bias for layer in layers]
    made: tuple[torch.Tensor, ...] = _LoraLinears.apply(
        x.to(kind),
        float(layers[0].scaling["default"]),
        *[weight.to(kind) for weight in weights],
        *[None if bias is None else bias.to(kind) for bias in biases],
        *[layer.lora_A["default"].weight for layer in layers],
        *[layer.lora_B["default"].weight for layer in layers],
    )
    return made
