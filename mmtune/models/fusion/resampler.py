"""Any number of features to a fixed number of tokens, by learned queries that attend to them.

Shapes: B rows, N features, D encoder width, H model width, M queries, W width of the instruction's embedding.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from mmtune.models.fusion.attention import Attention, PostNormAttention, PostNormFeedForward


class Perceiver(nn.Module):
    """The perceiver resampler of Flamingo (Alayrac et al. 2022): queries attend to features and to themselves.

    An instruction, where one is given, is one more thing to attend to.
    """

    def __init__(self, source_width: int, width: int, *, queries: int, layers: int, heads: int) -> None:
        super().__init__()
        self.source = nn.Linear(source_width, width)
        self.queries = nn.Parameter(torch.empty(queries, width))
        self.layers = nn.ModuleList(_PerceiverLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the queries anew."""
        nn.init.normal_(self.queries)

    def forward(
        self,
        features_BND: torch.Tensor,
        seen_BN: torch.Tensor | None = None,
        instruction_BH: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns ``(B, M, H)``; where no feature is seen it depends on queries and instruction alone.

        Args:
            features_BND: Of an encoder.
            seen_BN: False at padding and at missing media; None where all are there.
            instruction_BH: Embedding of the instruction at the model's width.
        """
        context_BNH = self.source(features_BND)
        if seen_BN is None:
            seen_BN = features_BND.new_ones(features_BND.shape[:2], dtype=torch.bool)
        if instruction_BH is not None:
            context_BNH = torch.cat((context_BNH, instruction_BH[:, None]), dim=1)
            seen_BN = functional.pad(seen_BN, (0, 1), value=True)
        made_BMH = self.queries.to(context_BNH.dtype).expand(features_BND.shape[0], -1, -1)
        seen_BN = functional.pad(seen_BN, (0, made_BMH.shape[1]), value=True)
        for layer in self.layers:
            made_BMH = layer(made_BMH, context_BNH, seen_BN)
        return self.norm(made_BMH)


class _PerceiverLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.context_norm = nn.LayerNorm(width)
        self.query_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, bias=False)
        self.inner_norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 4 * width, bias=False)
        self.outer = nn.Linear(4 * width, width, bias=False)

    def forward(self, made_BMH: torch.Tensor, context_BNH: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        asking = self.query_norm(made_BMH)
        source = torch.cat((self.context_norm(context_BNH), asking), dim=1)
        made_BMH = made_BMH + self.attention(asking, source, seen)
        return made_BMH + self.outer(functional.relu(self.inner(self.inner_norm(made_BMH))))


class QFormer(nn.Module):
    """The Q-Former of BLIP-2 (Li et al. 2023), with cross-attention in every layer.

    As in InstructBLIP (Dai et al. 2023) the queries attend to the instruction, here to its one embedding, and so
    ask for what it needs.
    """

    def __init__(self, source_width: int, width: int, *, queries: int, layers: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(queries, width))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(_QFormerLayer(source_width, width, heads) for _ in range(layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the queries anew."""
        nn.init.normal_(self.queries, std=0.02)

    def forward(
        self,
        features_BND: torch.Tensor,
        seen_BN: torch.Tensor | None = None,
        instruction_BH: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns ``(B, M, H)``; where no feature is seen it depends on queries and instruction alone.

        Args:
            features_BND: Of an encoder.
            seen_BN: False at padding and at missing media; None where all are there.
            instruction_BH: Embedding of the instruction at the model's width.
        """
        queries = self.queries.shape[0]
        made = self.queries.to(features_BND.dtype).expand(features_BND.shape[0], -1, -1)
        if instruction_BH is not None:
            made = torch.cat((made, instruction_BH[:, None]), dim=1)
        made = self.norm(made)
        for layer in self.layers:
            made = layer(made, queries, features_BND, seen_BN)
        return made[:, :queries]


class _QFormerLayer(nn.Module):
    def __init__(self, source_width: int, width: int, heads: int) -> None:
        super().__init__()
        self.self_attention = PostNormAttention(width, heads)
        self.cross_attention = PostNormAttention(width, heads, source_width)
        self.query_feed_forward = PostNormFeedForward(width)
        self.instruction_feed_forward = PostNormFeedForward(width)

    def forward(
        self, made: torch.Tensor, queries: int, features_BND: torch.Tensor, seen_BN: torch.Tensor | None
    ) -> torch.Tensor:
        made = self.self_attention(made, made)
        asking = self.cross_attention(made[:, :queries], features_BND, seen_BN)
        asking = self.query_feed_forward(asking)
        if made.shape[1] == queries:
            return asking
        return torch.cat((asking, self.instruction_feed_forward(made[:, queries:])), dim=1)
