"""The last block of a Llama-like decoder for the tokens that bear loss alone, as two operations, on a CPU.

Of all tokens keys and values are read, of the others' outputs nothing (``label_tokens``): queries, what they mix, its
projection and the MLP are made where a label is predicted. The halves are those of ``half_block``.

Shapes: B rows, T tokens, N of all rows, Q of them that bear loss; H model width; q heads that ask, g heads of keys, D
their width; the rest as in ``projections`` and ``strips``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmtune.models.half_block import Half, run_mlp
from mmtune.models.projections import Fan
from mmtune.models.rms_norm import normed
from mmtune.models.rotary import turned
from mmtune.models.strips import Span, Strip, attended, attended_back


@dataclass(frozen=True, slots=True)
class Asked:
    """The tokens that bear loss.

    Attributes:
        at_Q: Where they stand among all rows' tokens, in order.
        rows: Of every row that has some: its number, where its own stand among the Q, and these as a strip.
    """

    at_Q: torch.Tensor
    rows: Sequence[tuple[int, Span, Strip]]


def asked_of(masks: Sequence[torch.Tensor], rows_Q: torch.Tensor, places_Q: torch.Tensor) -> Asked:
    """Returns the tokens that bear loss as they are asked.

    Args:
        masks: ``(T, T)`` of every row, added to its scores.
        rows_Q: Their rows, in order.
        places_Q: Their places within them.
    """
    tokens, first, rows = len(masks[0]), 0, []
    for number, (mask_TT, count) in enumerate(zip(masks, rows_Q.bincount(minlength=len(masks)).tolist(), strict=True)):
        if count:
            own = first, first + count
            rows.append((number, own, Strip((0, count), ((0, tokens),), mask_TT[places_Q[slice(*own)]])))
            first += count
    return Asked(rows_Q * tokens + places_Q, rows)


def run_asked(
    x_BTH: torch.Tensor,
    halves: tuple[Half, Half],
    cos: torch.Tensor,
    sin: torch.Tensor,
    asked: Asked,
    scaling: float,
) -> torch.Tensor:
    """Returns ``(B, T, H)``, what a block makes of the tokens that are asked; zero at all others.

    Args:
        x_BTH: The block's input.
        halves: Of the block.
        cos: ``(B, T, 1, D)`` of the angles of places.
        sin: As ``cos``.
        asked: At least one token.
        scaling: Of the scores.
    """
    first, second = halves
    made_QH: torch.Tensor = _Attention.apply(x_BTH, first, cos, sin, asked, scaling, *first.adapters)
    whole_NH = made_QH.new_zeros(x_BTH.shape[0] * x_BTH.shape[1], x_BTH.shape[2])
    return whole_NH.index_copy(0, asked.at_Q, run_mlp(made_QH, second)).view(x_BTH.shape)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTH: torch.Tensor,
        half: Half,
        cos: torch.Tensor,
        sin: torch.Tensor,
        asked: Asked,
        scaling: float,
        *adapters: torch.Tensor,
    ) -> torch.Tensor:
        x_NH, head = x_BTH.reshape(-1, x_BTH.shape[-1]), cos.shape[-1]
        asks, told = _fans(half)
        normed_NH, scale_N1 = normed(x_NH, half.norm_H, half.epsilon)
        made, told_RN = told.project(normed_NH)
        normed_QH = normed_NH[asked.at_Q]
        (query_QI,), asks_RQ = asks.project(normed_QH)
        key_BTgD, value_BTgD = (own.view(*x_BTH.shape[:2], -1, head) for own in made)
        key_BTgD = turned(key_BTgD, cos, sin, 1)
        query_QqD = turned(query_QI.view(len(query_QI), -1, head), *_at(x_BTH.shape, cos, sin, asked), 1)
        mixed_QqD, kept = torch.empty_like(query_QqD), []
        for number, own, strip in asked.rows:
            given = _given(query_QqD, key_BTgD, value_BTgD, number, own)
            kept += attended(given, [strip], scaling, mixed_QqD[slice(*own)])
        (made_QH,), last_RQ = half.last.project(mixed_QqD.flatten(1))
        saved = x_NH, normed_NH, normed_QH, scale_N1, told_RN, asks_RQ, last_RQ
        ctx.save_for_backward(*saved, query_QqD, key_BTgD, value_BTgD, mixed_QqD, cos, sin, *kept)
        ctx.half, ctx.asked, ctx.scaling, ctx.shape = half, asked, scaling, x_BTH.shape
        return made_QH.add_(x_NH[asked.at_Q])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_QH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NH, normed_NH, normed_QH, scale_N1, told_RN, asks_RQ, last_RQ, *more = ctx.saved_tensors
        query_QqD, key_BTgD, value_BTgD, mixed_QqD, cos, sin, *kept = more
        half, asked, wanted = ctx.half, ctx.asked, ctx.needs_input_grad[0]
        asks, told = _fans(half)
        mixed_grad, last = half.last.project_back([grad_QH], mixed_QqD.flatten(1), last_RQ)
        mixed_grad, query_grad = mixed_grad.view(mixed_QqD.shape), torch.empty_like(query_QqD)
        # A row without labels is asked nothing.
        key_grad, value_grad = (torch.zeros_like(key_BTgD) for _ in range(2))
        for (number, own, strip), chances in zip(asked.rows, kept, strict=True):
            given = _given(query_QqD, key_BTgD, value_BTgD, number, own)
            into = query_grad[slice(*own)], key_grad[number], value_grad[number]
            attended_back(mixed_grad[slice(*own)], given, [chances], [strip], ctx.scaling, into)
        query_grad = turned(query_grad, *_at(ctx.shape, cos, sin, asked), -1)
        told_grads = [grad.flatten(2).flatten(0, 1) for grad in (turned(key_grad, cos, sin, -1), value_grad)]
        grad_of_asks, asks_adapters = asks.project_back([query_grad.flatten(1)], normed_QH, asks_RQ, wanted=wanted)
        normed_grad, told_adapters = told.project_back(told_grads, normed_NH, told_RN, wanted=wanted)
        x_grad = None
        if wanted:
            normed_grad.index_add_(0, asked.at_Q, grad_of_asks)
            x_grad = half.norm_back(normed_grad, x_NH, scale_N1).index_add_(0, asked.at_Q, grad_QH).view(ctx.shape)
        return x_grad, None, None, None, None, None, *asks_adapters, *told_adapters, *last


def _fans(half: Half) -> tuple[Fan, Fan]:
    """Returns the layers of queries, and those of keys and values."""
    return Fan(half.first.layers[:1]), Fan(half.first.layers[1:])


def _at(shape: Any, cos: torch.Tensor, sin: torch.Tensor, asked: Asked) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``(Q, 1, D)`` cos and sin of the tokens that are asked."""
    cos_Q1D, sin_Q1D = (angle.expand(*shape[:2], 1, -1).flatten(0, 1)[asked.at_Q] for angle in (cos, sin))
    return cos_Q1D, sin_Q1D


def _given(
    query_QqD: torch.Tensor, key_BTgD: torch.Tensor, value_BTgD: torch.Tensor, number: int, own: Span
) -> tuple[torch.Tensor, ...]:
    """Returns a row's queries, keys and values by heads."""
    return tuple(value.transpose(0, 1) for value in (query_QqD[slice(*own)], key_BTgD[number], value_BTgD[number]))
