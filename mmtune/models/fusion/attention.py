"""Masked attention and the post-norm layers of BERT; a token that sees nothing gets nothing.

Masks are bool, True where a key is seen. Shapes: B rows, h heads, Q queries, K keys, d head width,
T tokens, N source tokens, D source width, H width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns ``softmax(QK^T / sqrt(d)) V``, ``(B, h, Q, d)``, zero where a query sees no key.

    A masked key and value get a gradient of exactly zero; they must be finite.

    Args:
        query: ``(B, h, Q, d)``.
        key: ``(B, h, K, d)``.
        value: ``(B, h, K, d)``.
        seen: Bool, broadcast to ``(B, h, Q, K)``; None lets all be seen.
    """
    if seen is None:
        return functional.scaled_dot_product_attention(query, key, value)
    alive = seen.any(-1, keepdim=True)
    # A softmax over nothing is NaN in some kernels, also in the gradient: such a row sees all, and its answer goes.
    made = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen | ~alive)
    return made.masked_fill(~alive, 0.0)


class Attention(nn.Module):
    """Multi-head attention of a stream to a source, or to itself."""

    def __init__(self, width: int, heads: int, source_width: int | None = None, *, bias: bool = True) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} does not divide by {heads} heads")
        source_width = width if source_width is None else source_width
        self.heads = heads
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(source_width, width, bias=bias)
        self.value = nn.Linear(source_width, width, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)

    def forward(
        self, hidden_BTH: torch.Tensor, source_BND: torch.Tensor, seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns ``(B, T, H)``, zero for tokens that see no source.

        Args:
            hidden_BTH: The stream that asks.
            source_BND: The stream that answers.
            seen: Bool ``(B, N)``, or ``(B, T, N)`` where tokens see different things.
        """
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(hidden_BTH), self.key(source_BND), self.value(source_BND))
        )
        if seen is None:
            return self.output(attend(query, key, value).transpose(1, 2).flatten(2))
        seen_BQN = seen if seen.dim() == 3 else seen[:, None]
        made_BTH = self.output(attend(query, key, value, seen_BQN[:, None]).transpose(1, 2).flatten(2))
        return made_BTH.masked_fill(~seen_BQN.any(-1, keepdim=True), 0.0)


class PostNormAttention(nn.Module):
    """``norm(x + attention(x, source))``, as in BERT."""

    def __init__(self, width: int, heads: int, source_width: int | None = None, *, eps: float = 1e-12) -> None:
        super().__init__()
        self.attention = Attention(width, heads, source_width)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(
        self, hidden_BTH: torch.Tensor, source_BND: torch.Tensor, seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns ``(B, T, H)``; ``seen`` is ``(B, N)`` or ``(B, T, N)``."""
        return self.norm(hidden_BTH + self.attention(hidden_BTH, source_BND, seen))


class PostNormFeedForward(nn.Module):
    """``norm(x + W2 gelu(W1 x))``, as in BERT."""

    def __init__(self, width: int, inner_width: int | None = None, *, eps: float = 1e-12) -> None:
        super().__init__()
        inner_width = 4 * width if inner_width is None else inner_width
        self.inner = nn.Linear(width, inner_width)
        self.outer = nn.Linear(inner_width, width)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        """Returns ``(B, T, H)``."""
        return self.norm(hidden_BTH + self.outer(functional.gelu(self.inner(hidden_BTH))))
