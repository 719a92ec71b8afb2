"""The multimodal autoencoder: one code from all modalities, and every modality decoded from it.

Ngiam et al. 2011. With a modality dropped from the input and kept in the loss, the code learns to fill it in.
Shapes: B rows, D width of a modality's features, C width of the code.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mmtune.errors import RecipeError


class Autoencoder(nn.Module):
    """Encoders and decoders per modality around the mean of what the encoders say.

    With ``inner_width`` None both are linear, and the best code is that of PCA over all features side by side.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        code_width: int,
        inner_width: int | None = None,
        target_widths: Mapping[str, int] | None = None,
    ) -> None:
        """Makes random encoders and decoders.

        Args:
            widths: Width of the pooled features by modality; its order is that of ``present``.
            code_width: C.
            inner_width: Width of one hidden layer each way, or None for the linear autoencoder.
            target_widths: Width of what is decoded by modality, where that is not the features themselves.

        Raises:
            RecipeError: The code is wider than all features together.
        """
        super().__init__()
        total = sum(widths.values())
        if code_width > total:
            raise RecipeError(
                f"a code of {code_width} is wider than the features it is made from ({total})",
                "choose a smaller code: a wide one copies instead of compressing",
            )
        self.encoders = nn.ModuleDict({name: _layers(width, inner_width, code_width) for name, width in widths.items()})
        made = widths if target_widths is None else target_widths
        self.decoders = nn.ModuleDict({name: _layers(code_width, inner_width, width) for name, width in made.items()})

    def encode(self, features: Mapping[str, torch.Tensor], kept_BK: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the joint code, ``(B, C)``: the mean over the modalities kept, zero where none is.

        Args:
            features: ``(B, D)`` by modality; one that the batch lacks altogether may be missing.
            kept_BK: Bool, a column per modality in the constructor's order; None keeps what is in ``features``.
        """
        if not set(self.encoders) & set(features):
            raise ValueError(f"none of {', '.join(self.encoders)} is there to encode")
        return self.join(
            {name: encoder(features[name]) for name, encoder in self.encoders.items() if name in features}, kept_BK
        )

    def join(self, codes: Mapping[str, torch.Tensor], kept_BK: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the joint code, ``(B, C)``, of what each modality's encoder said.

        Args:
            codes: ``(B, C)`` by modality.
            kept_BK: As in ``encode``.
        """
        columns = [index for index, name in enumerate(self.encoders) if name in codes]
        codes_KBC = torch.stack([codes[name] for name in self.encoders if name in codes])
        if kept_BK is None:
            return codes_KBC.mean(0)
        kept_KB1 = kept_BK[:, columns].T[..., None]
        total_BC = codes_KBC.masked_fill(~kept_KB1, 0.0).sum(0)
        return total_BC / kept_KB1.sum(0).clamp(min=1)

    def decode(self, code_BC: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns every modality's features, or what is decoded in their place, ``(B, D)``, from the code."""
        return {name: decoder(code_BC) for name, decoder in self.decoders.items()}

    def errors(
        self,
        features: Mapping[str, torch.Tensor],
        present_BK: torch.Tensor | None = None,
        kept_BK: torch.Tensor | None = None,
        targets: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Returns ``||x - x'||^2`` per row, ``(B,)``, by modality; zero where a row lacks it.

        The rows that fit least are those whose modalities do not belong together.

        Args:
            features: ``(B, D)`` by modality.
            present_BK: What each row has, and so what is scored; None for all of ``features``.
            kept_BK: What the code may read; None for what is present.
            targets: ``(B, D)`` what is decoded by modality; None for the features.
        """
        code_BC = self.encode(features, present_BK if kept_BK is None else kept_BK)
        return self.errors_of(code_BC, features if targets is None else targets, present_BK)

    def errors_of(
        self, code_BC: torch.Tensor, wanted: Mapping[str, torch.Tensor], present_BK: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Returns ``errors`` of a joint code.

        Args:
            code_BC: From ``encode`` or ``join``.
            wanted: ``(B, D)`` what is decoded by modality.
            present_BK: As in ``errors``.
        """
        made, found = self.decode(code_BC), {}
        for index, name in enumerate(self.encoders):
            if name in self.decoders and name in wanted:
                error_B = (wanted[name] - made[name]).square().sum(-1)
                found[name] = error_B if present_BK is None else error_B.masked_fill(~present_BK[:, index], 0.0)
        return found

    def losses(
        self,
        features: Mapping[str, torch.Tensor],
        present_BK: torch.Tensor | None = None,
        kept_BK: torch.Tensor | None = None,
        targets: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Returns the mean squared norm of the error by modality, over the rows that have it.

        Their sum is the reconstruction loss. A modality of large numbers rules it: watch each.

        Args:
            features: ``(B, D)`` by modality.
            present_BK: What each row has.
            kept_BK: What the code may read, from ``modality_dropout``.
            targets: As in ``errors``.
        """
        return self.mean_errors(self.errors(features, present_BK, kept_BK, targets), present_BK)

    def mean_errors(
        self, errors: Mapping[str, torch.Tensor], present_BK: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Returns the mean of ``errors`` by modality, over the rows that have it."""
        if present_BK is None:
            return {name: error_B.mean() for name, error_B in errors.items()}
        rows = dict(zip(self.encoders, present_BK.sum(0).clamp(min=1).unbind(), strict=True))
        return {name: error_B.sum() / rows[name] for name, error_B in errors.items()}

    @torch.no_grad()
    def reduce(self, features: Mapping[str, torch.Tensor], present_BK: torch.Tensor | None = None) -> torch.Tensor:
        """Returns codes to keep in place of the features, ``(B, C)``, without a gradient."""
        return self.encode(features, present_BK)


def _layers(source_width: int, inner_width: int | None, width: int) -> nn.Module:
    if inner_width is None:
        return nn.Linear(source_width, width)
    return nn.Sequential(nn.Linear(source_width, inner_width), nn.GELU(), nn.Linear(inner_width, width))
