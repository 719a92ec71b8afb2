"""From an encoder's features to the language model's width, token by token or through learned queries.

Every projector is called ``projector(features_BND, seen_BN, instruction_BH)``.
Shapes: B rows, N features, D encoder width, H model width, M tokens out (N, or the number of queries).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from mmtune.errors import RecipeError
from mmtune.models.fusion.resampler import Perceiver, QFormer


class LinearProjector(nn.Module):
    """One linear layer per feature."""

    def __init__(self, source_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(source_width, width)

    def forward(
        self,
        features_BND: torch.Tensor,
        seen_BN: torch.Tensor | None = None,
        instruction_BH: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns ``(B, N, H)``; a feature is projected alone, so mask and instruction change nothing."""
        return self.linear_1(features_BND)


class MlpProjector(nn.Module):
    """Two layers with GELU between, as in LLaVA 1.5 (Liu et al. 2023); its names are transformers' Llava's."""

    def __init__(self, source_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(source_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(
        self,
        features_BND: torch.Tensor,
        seen_BN: torch.Tensor | None = None,
        instruction_BH: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns ``(B, N, H)``; a feature is projected alone, so mask and instruction change nothing."""
        return self.linear_2(functional.gelu(self.linear_1(features_BND)))


PROJECTORS = ("linear", "mlp", "perceiver", "qformer")
"""``linear`` and ``mlp`` keep the number of tokens; ``perceiver`` and ``qformer`` give one per query."""


def build_projector(
    kind: str, source_width: int, width: int, *, queries: int = 32, layers: int = 2, heads: int = 8
) -> nn.Module:
    """Returns a projector of random weights.

    Args:
        kind: One of ``PROJECTORS``.
        source_width: Width D of the features.
        width: Width H of the language model.
        queries: Tokens that a resampler gives per medium.
        layers: Depth of a resampler.
        heads: Attention heads of a resampler.

    Raises:
        RecipeError: No such kind, or the heads do not divide the width.
    """
    if kind == "linear":
        return LinearProjector(source_width, width)
    if kind == "mlp":
        return MlpProjector(source_width, width)
    if kind not in PROJECTORS:
        raise RecipeError(f"there is no projector {kind!r}", f"use one of {', '.join(PROJECTORS)}")
    if width % heads:
        raise RecipeError(
            f"{heads} heads of a {kind} projector do not divide the model's width of {width}",
            "choose a number of heads that divides it",
        )
    resampler = Perceiver if kind == "perceiver" else QFormer
    return resampler(source_width, width, queries=queries, layers=layers, heads=heads)


def projected_tokens(kind: str, features: int, queries: int) -> int:
    """Returns how many tokens M a medium of N features becomes: known before anything is decoded."""
    return queries if kind in ("perceiver", "qformer") else features
