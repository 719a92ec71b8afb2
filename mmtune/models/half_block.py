"""Half a block of a Llama-like decoder as one operation, on a CPU: a norm, layers, something between, a layer, a sum.

What its LoRA layers share is multiplied once (``projections``), sums are written where they are read, and what the
gradients need is kept, nothing else. Weights are frozen; LoRA's are what trains. The half of the MLP stands here, those
of attention in ``decoder_block`` and ``label_block``.

Shapes: B rows, T tokens, N of all rows; H model width, I width of the MLP; the rest as in ``projections``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmtune.models.projections import Fan, is_still, projection_of
from mmtune.models.rms_norm import along, normed

_OF_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_OF_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Half:
    """Half a block: a norm, layers of what it makes, something between, and a layer back to the model's width.

    Attributes:
        norm_H: Weight of the norm.
        epsilon: Of the norm.
        first: Layers of what the norm makes.
        last: The layer whose output is added to the input.
    """

    norm_H: torch.Tensor
    epsilon: float
    first: Fan
    last: Fan

    @property
    def adapters(self) -> list[torch.Tensor]:
        """A and B of every layer."""
        layers = (*self.first.layers, *self.last.layers)
        return [value for layer in layers for value in (layer.a_rI, layer.b_Or)]

    def back(
        self,
        grad_NH: torch.Tensor,
        grads: Sequence[torch.Tensor],
        x_NH: torch.Tensor,
        normed_NH: torch.Tensor,
        scale_N1: torch.Tensor,
        inner_RN: torch.Tensor,
        *,
        wanted: bool,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Returns ``(N, H)`` the gradient of the input, where it is wanted, and those of the first layers' adapters.

        Args:
            grad_NH: Of the half's output.
            grads: Of what the first layers made.
            x_NH: The half's input.
            normed_NH: What its norm made.
            scale_N1: Of the norm.
            inner_RN: Of the first layers.
            wanted: Something before the half trains.
        """
        normed_grad_NH, adapters = self.first.project_back(grads, normed_NH, inner_RN, wanted=wanted)
        return self.norm_back(normed_grad_NH, x_NH, scale_N1, grad_NH) if wanted else None, adapters

    def norm_back(
        self,
        normed_grad_NH: torch.Tensor,
        x_NH: torch.Tensor,
        scale_N1: torch.Tensor,
        onto_NH: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns ``(N, H)``, the norm's share of the gradient of the half's input, added to something.

        Args:
            normed_grad_NH: Of what the norm made; is written.
            x_NH: The half's input.
            scale_N1: Of the norm.
            onto_NH: What it is added to; nothing unless given.
        """
        scaled_NH = normed_grad_NH.mul_(self.norm_H)
        along_N1 = along(scaled_NH, x_NH, scale_N1)
        if onto_NH is None:
            return scaled_NH.mul_(scale_N1).addcmul_(x_NH, along_N1)
        return torch.addcmul(onto_NH, scaled_NH, scale_N1).addcmul_(x_NH, along_N1)


def run_mlp(x_BTH: torch.Tensor, half: Half) -> torch.Tensor:
    """Returns ``(B, T, H)``, ``x + mlp(norm(x))``."""
    made_BTH: torch.Tensor = _Mlp.apply(x_BTH, half, *half.adapters)
    return made_BTH


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTH: torch.Tensor, half: Half, *adapters: torch.Tensor) -> torch.Tensor:
        x_NH = x_BTH.reshape(-1, x_BTH.shape[-1])
        normed_NH, scale_N1 = normed(x_NH, half.norm_H, half.epsilon)
        (gate_NI, up_NI), inner_RN = half.first.project(normed_NH)
        # Kept: an exponential costs more than the memory of what it makes.
        open_NI = torch.sigmoid(gate_NI)
        product_NI = torch.mul(gate_NI, open_NI).mul_(up_NI)
        (made_NH,), inner_rN = half.last.project(product_NI)
        ctx.save_for_backward(x_NH, normed_NH, scale_N1, inner_RN, gate_NI, up_NI, open_NI, product_NI, inner_rN)
        ctx.half = half
        return made_NH.add_(x_NH).view(x_BTH.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BTH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NH, normed_NH, scale_N1, inner_RN, gate_NI, up_NI, open_NI, product_NI, inner_rN = ctx.saved_tensors
        half: Half = ctx.half
        grad_NH = grad_BTH.reshape(x_NH.shape)
        product_grad, last = half.last.project_back([grad_NH], product_NI, inner_rN)
        silu_NI = torch.mul(gate_NI, open_NI)
        up_grad = torch.mul(silu_NI, product_grad)
        # Of silu(g) = g s(g) the derivative is s + g s (1 - s).
        slope_NI = silu_NI.addcmul_(silu_NI, open_NI, value=-1).add_(open_NI)
        gate_grad = slope_NI.mul_(product_grad).mul_(up_NI)
        grads, wanted = [gate_grad, up_grad], ctx.needs_input_grad[0]
        x_grad, first = half.back(grad_NH, grads, x_NH, normed_NH, scale_N1, inner_RN, wanted=wanted)
        return like(grad_BTH, x_grad), None, *first, *last


def like(grad_BTH: torch.Tensor, x_grad: torch.Tensor | None) -> torch.Tensor | None:
    """Returns a gradient of all tokens by rows, where there is one."""
    return None if x_grad is None else x_grad.view(grad_BTH.shape)


def layers_of(block: Any) -> list[Any]:
    """Returns the linear layers of a block, with LoRA or without: q, k, v, o, gate, up, down."""
    # Not by attributes: every block is asked at every step.
    parts = block._modules
    attention, mlp = parts["self_attn"]._modules, parts["mlp"]._modules
    return [attention[name] for name in _OF_ATTENTION] + [mlp[name] for name in _OF_MLP]


def halves_of(block: Any, known: tuple[Half, Half] | None = None) -> tuple[Half, Half] | None:
    """Returns what a block is made of; None where more than LoRA trains in it.

    Args:
        block: That computes as Llama's does.
        known: What was returned before, to be returned again while it holds.
    """
    layers, norms = layers_of(block), [block.input_layernorm, block.post_attention_layernorm]
    if any(norm.weight.requires_grad for norm in norms):
        return None
    if known is not None and _hold(known, layers, norms):
        return known
    found = [made for layer in layers if (made := projection_of(layer)) is not None]
    if len(found) < len(layers):
        return None
    (one, first), (two, second) = ((norm.weight, norm.variance_epsilon) for norm in norms)
    attention, mlp = (Fan(tuple(found[:3])), Fan((found[3],))), (Fan(tuple(found[4:6])), Fan((found[6],)))
    return Half(one, first, *attention), Half(two, second, *mlp)


def _hold(known: tuple[Half, Half], layers: Sequence[Any], norms: Sequence[Any]) -> bool:
    made = [projection for half in known for fan in (half.first, half.last) for projection in fan.layers]
    return all(map(is_still, layers, made)) and all(
        half.norm_H is norm.weight for half, norm in zip(known, norms, strict=True)
    )
