"""ViLBERT's co-attention: two streams, each attends to the other.

Shapes: B rows, T text tokens, N media tokens, H text width, D media width.
"""

from __future__ import annotations

import torch
from torch import nn

from mmtune.models.fusion.attention import PostNormAttention, PostNormFeedForward


class CoAttention(nn.Module):
    """Queries of each stream meet keys and values of the other, then each stream's own MLP (Lu et al. 2019).

    ``text + tanh(gate) (block(text) - text)``: the gate starts at 0, so a layer put into a trained language model
    is the identity on its text; an open gate is ViLBERT's block. The media stream has no gate.
    """

    def __init__(self, width: int, media_width: int, heads: int, media_heads: int | None = None) -> None:
        super().__init__()
        self.text_attention = PostNormAttention(width, heads, media_width)
        self.media_attention = PostNormAttention(media_width, media_heads or heads, width)
        self.text_feed_forward = PostNormFeedForward(width)
        self.media_feed_forward = PostNormFeedForward(media_width)
        self.gate = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Shuts the gate of the text stream."""
        nn.init.zeros_(self.gate)

    def cross(
        self,
        text_BTH: torch.Tensor,
        media_BND: torch.Tensor,
        text_sees: torch.Tensor | None = None,
        media_sees: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns both streams after the attention alone, each computed from the other as it came in.

        Args:
            text_BTH: The text stream.
            media_BND: The media stream.
            text_sees: Bool ``(B, N)`` or ``(B, T, N)``, the media that text sees.
            media_sees: Bool ``(B, T)`` or ``(B, N, T)``, the text that media see.
        """
        text = self.text_attention(text_BTH, media_BND, text_sees)
        return text, self.media_attention(media_BND, text_BTH, media_sees)

    def forward(
        self,
        text_BTH: torch.Tensor,
        media_BND: torch.Tensor,
        text_sees: torch.Tensor | None = None,
        media_sees: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns both streams; text without a medium to see is left as it is.

        Args:
            text_BTH: The text stream.
            media_BND: The media stream.
            text_sees: Bool ``(B, N)`` or ``(B, T, N)``, the media that text sees.
            media_sees: Bool ``(B, T)`` or ``(B, N, T)``, the text that media see.
        """
        text, media = self.cross(text_BTH, media_BND, text_sees, media_sees)
        change = torch.tanh(self.gate) * (self.text_feed_forward(text) - text_BTH)
        if text_sees is not None:
            alone = ~text_sees.any(-1, keepdim=True)
            change = change.masked_fill(alone if text_sees.dim() == 3 else alone[:, None], 0.0)
        return text_BTH + change, self.media_feed_forward(media)
