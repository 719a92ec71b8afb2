"""Attention as the products that it is, on a CPU: what short rows take less time by than by a flash kernel.

``softmax(Q K^T * s + mask) V`` strip by strip of queries, with the probabilities kept for the backward pass, so that no
score is computed twice; the gradient is ``dS = P * (dP - rowsum(dP * P))`` (Dao et al. 2022, arXiv:2205.14135, appendix
B.2). Outputs and gradients are written where the layers read them: no copies are joined, no zeros added.

Shapes: T tokens of one row; H heads that ask and G heads that are asked, each by H / G; D head width, V width of a
value; Q queries of a strip, K their keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Strip:
    """Queries that stand together, with the keys they are asked of.

    Attributes:
        queries: First and end.
        keys: Spans of keys.
        mask_QK: Added to the scores.
    """

    queries: Span
    keys: tuple[Span, ...]
    mask_QK: torch.Tensor

    def keys_of(self, values_GTD: torch.Tensor) -> torch.Tensor:
        """Returns ``(G, K, D)``, what of all tokens' keys or values belongs to the strip."""
        return spans_of(values_GTD, self.keys, 1)

    def queries_of(self, asked_HTD: torch.Tensor, groups: int) -> torch.Tensor:
        """Returns ``(G, H / G * Q, D)``, the strip's queries side by side where they ask the same heads."""
        asked_HQD = asked_HTD[:, slice(*self.queries)]
        return asked_HQD.reshape(groups, -1, asked_HQD.shape[-1])


def spans_of(values: torch.Tensor, spans: Sequence[Span], axis: int) -> torch.Tensor:
    """Returns what of an axis stands in some spans, side by side."""
    if tuple(spans) == ((0, values.shape[axis]),):
        return values  # a slice of all would cost a copy in the backward pass
    parts = [values.narrow(axis, first, end - first) for first, end in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)


def attend(
    query_HTD: torch.Tensor, key_GTD: torch.Tensor, value_GTV: torch.Tensor, strips: Sequence[Strip], scaling: float
) -> torch.Tensor:
    """Returns ``(T, H, V)``, attention of one row.

    Args:
        query_HTD: Of every token.
        key_GTD: G divides H; neighbours among the H heads ask the same one.
        value_GTV: As the keys.
        strips: Their queries are together the whole row.
        scaling: Of the scores.
    """
    made: torch.Tensor = _Attention.apply(query_HTD, key_GTD, value_GTV, strips, scaling)
    return made


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_HTD: torch.Tensor,
        key_GTD: torch.Tensor,
        value_GTV: torch.Tensor,
        strips: Sequence[Strip],
        scaling: float,
    ) -> torch.Tensor:
        made_THV = query_HTD.new_empty(query_HTD.shape[1], len(query_HTD), value_GTV.shape[-1])
        given = query_HTD, key_GTD, value_GTV
        ctx.save_for_backward(*given, *attended(given, strips, scaling, made_THV))
        ctx.strips, ctx.scaling = strips, scaling
        return made_THV

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_THV: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_HTD, key_GTD, value_GTV, *kept = ctx.saved_tensors
        given = query_HTD, key_GTD, value_GTV
        # In the order of memory in which the layers before read them.
        grads = [torch.empty_like(x.transpose(0, 1), memory_format=torch.contiguous_format) for x in given]
        attended_back(grad_THV, given, kept, ctx.strips, ctx.scaling, grads)
        return *(grad.transpose(0, 1) for grad in grads), None, None


def attended(
    given: Sequence[torch.Tensor], strips: Sequence[Strip], scaling: float, made_THV: torch.Tensor
) -> list[torch.Tensor]:
    """Writes attention of one row and returns the probabilities of every strip, which its gradient needs.

    Args:
        given: Queries, keys and values, as ``attend`` takes them.
        strips: As there.
        scaling: As there.
        made_THV: Is written.
    """
    query_HTD, key_GTD, value_GTV = given
    heads, groups = len(query_HTD), len(key_GTD)
    kept = []
    for strip in strips:
        asked, key_GKD = strip.queries_of(query_HTD, groups), strip.keys_of(key_GTD)
        mask = strip.mask_QK.expand(groups, heads // groups, *strip.mask_QK.shape)
        mask = mask.reshape(groups, asked.shape[1], -1)
        chances = torch.baddbmm(mask, asked, key_GKD.mT, alpha=scaling).softmax(-1)
        made_GQV = torch.bmm(chances, strip.keys_of(value_GTV))
        _tokens(made_THV, strip.queries).copy_(_heads(made_GQV, heads))
        kept.append(chances)
    return kept


def attended_back(
    grad_THV: torch.Tensor,
    given: Sequence[torch.Tensor],
    kept: Sequence[torch.Tensor],
    strips: Sequence[Strip],
    scaling: float,
    grads: Sequence[torch.Tensor],
) -> None:
    """Writes the gradients of what one row was given.

    Args:
        grad_THV: Of what came out.
        given: As ``attended`` took them.
        kept: What it returned.
        strips: As there.
        scaling: As there.
        grads: ``(T, H, D)`` of queries, ``(T, G, D)`` of keys and ``(T, G, V)`` of values; are written.
    """
    (query_HTD, key_GTD, value_GTV), (query_grad, key_grad, value_grad) = given, grads
    heads, groups, grad_HTV, begun = len(query_HTD), len(key_GTD), grad_THV.transpose(0, 1), False
    for strip, chances in zip(reversed(strips), reversed(kept), strict=True):
        grad = strip.queries_of(grad_HTV, groups)
        asked, key_GKD = strip.queries_of(query_HTD, groups), strip.keys_of(key_GTD)
        scores = torch.bmm(grad, strip.keys_of(value_GTV).mT)
        scores = torch._softmax_backward_data(scores, chances, -1, chances.dtype)
        made_GQD = torch.bmm(scores, key_GKD)
        torch.mul(_heads(made_GQD, heads), scaling, out=_tokens(query_grad, strip.queries))
        _add(key_grad, strip, torch.bmm(scores.mT, asked), begun)
        _add(value_grad, strip, torch.bmm(chances.mT, grad), begun)
        begun = True
    key_grad.mul_(scaling)


def _tokens(values_THD: torch.Tensor, span: Span) -> torch.Tensor:
    """Returns ``(H, Q, D)``, a span of tokens by heads."""
    return values_THD[slice(*span)].transpose(0, 1)


def _heads(made: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns ``(H, Q, D)`` of ``(G, H / G * Q, D)``."""
    return made.reshape(heads, -1, made.shape[-1])


def _add(grad_TGD: torch.Tensor, strip: Strip, made_GKD: torch.Tensor, begun: bool) -> None:
    """Adds the gradient of a strip's keys or values to that of all tokens', which holds nothing before it has begun."""
    if not begun and strip.keys == ((0, len(grad_TGD)),):
        grad_TGD.copy_(made_GKD.transpose(0, 1))
        return
    if not begun:
        grad_TGD.zero_()
    at = 0
    for first, end in strip.keys:
        _tokens(grad_TGD, (first, end)).add_(made_GKD[:, at : at + end - first])
        at += end - first
