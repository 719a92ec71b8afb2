"""Flamingo's gated cross-attention: a layer between those of a language model that starts as the identity.

Shapes: B rows, T tokens, H model width, N media tokens, D their width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from mmtune.models.fusion.attention import Attention


class GatedCrossAttention(nn.Module):
    """``x + tanh(a) attention(norm(x), media)``, then ``x + tanh(b) mlp(norm(x))``, with a = b = 0 at the start.

    Alayrac et al. 2022; norms and MLP (RMSNorm, SwiGLU) are those of today's language models, as in IDEFICS.
    """

    def __init__(self, width: int, heads: int, source_width: int, inner_width: int | None = None) -> None:
        super().__init__()
        inner_width = 4 * width if inner_width is None else inner_width
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, source_width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.gate_proj = nn.Linear(width, inner_width, bias=False)
        self.up_proj = nn.Linear(width, inner_width, bias=False)
        self.down_proj = nn.Linear(inner_width, width, bias=False)
        self.attention_gate = nn.Parameter(torch.empty(1))
        self.mlp_gate = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Shuts both gates: the layer is the identity again."""
        nn.init.zeros_(self.attention_gate)
        nn.init.zeros_(self.mlp_gate)

    def forward(
        self, hidden_BTH: torch.Tensor, media_BND: torch.Tensor, seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns ``(B, T, H)``; a token that sees no medium passes through the gated MLP alone.

        Args:
            hidden_BTH: Of the language model, before its layer.
            media_BND: Projected or resampled media.
            seen: Bool ``(B, N)``, or ``(B, T, N)``: which media tokens each token sees.
        """
        attended = self.attention(self.attention_norm(hidden_BTH), media_BND, seen)
        hidden_BTH = hidden_BTH + torch.tanh(self.attention_gate) * attended
        inner = self.mlp_norm(hidden_BTH)
        made = self.down_proj(functional.silu(self.gate_proj(inner)) * self.up_proj(inner))
        return hidden_BTH + torch.tanh(self.mlp_gate) * made
