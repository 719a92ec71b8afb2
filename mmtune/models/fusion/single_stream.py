"""MMBT's single stream: media and text in one bidirectional sequence, told apart by segments.

Shapes: B rows, T tokens of the whole stream, H width.
"""

from __future__ import annotations

import torch
from torch import nn

from mmtune.models.fusion.attention import PostNormAttention, PostNormFeedForward


class SegmentEmbedding(nn.Module):
    """What is added to a token for its segment: text, image, audio, video; zero at the start.

    A trained language model that gets segments is so at first the same model.
    """

    def __init__(self, segments: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(segments, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets all segments to zero."""
        nn.init.zeros_(self.weight)

    def forward(self, segments_BT: torch.Tensor) -> torch.Tensor:
        """Returns ``(B, T, H)`` for integer segments."""
        return nn.functional.embedding(segments_BT, self.weight)


def prefix_mask(seen: torch.Tensor, prefix_BT: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
    """Returns the bool mask that lets the tokens of a prefix see each other in both directions.

    For a causal language model that reads media and question as MMBT does and answers token by token.

    Args:
        seen: The causal mask so far, bool, broadcast to ``(B, 1, T, T)``.
        prefix_BT: True at media and at the text before the first answer.
        valid_BT: False at padding.
    """
    within = prefix_BT & valid_BT
    return seen | (within[:, None, :, None] & within[:, None, None, :])


class SingleStream(nn.Module):
    """A bidirectional transformer over embeddings of any modality: BERT behind its word table.

    MMBT (Kiela et al. 2019) shares the position table between modalities, so each counts from 0.
    """

    def __init__(
        self,
        width: int,
        *,
        layers: int,
        heads: int,
        segments: int,
        positions: int,
        inner_width: int | None = None,
    ) -> None:
        super().__init__()
        self.segment = SegmentEmbedding(segments, width)
        self.position = nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(_Layer(width, heads, inner_width) for _ in range(layers))

    def forward(
        self,
        embeddings_BTH: torch.Tensor,
        segments_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        valid_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the last hidden states, ``(B, T, H)``.

        Args:
            embeddings_BTH: Projected media and embedded text, one after the other.
            segments_BT: Which modality a token is of.
            positions_BT: Place of a token within its segment.
            valid_BT: False at padding and missing media.
        """
        hidden = self.norm(embeddings_BTH + self.segment(segments_BT) + self.position(positions_BT))
        for layer in self.layers:
            hidden = layer(hidden, valid_BT)
        return hidden


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, inner_width: int | None) -> None:
        super().__init__()
        self.attention = PostNormAttention(width, heads)
        self.feed_forward = PostNormFeedForward(width, inner_width)

    def forward(self, hidden_BTH: torch.Tensor, valid_BT: torch.Tensor | None) -> torch.Tensor:
        return self.feed_forward(self.attention(hidden_BTH, hidden_BTH, valid_BT))
