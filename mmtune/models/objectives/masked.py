"""ViLBERT's pretraining (Lu et al. 2019): masked tokens, masked regions, and whether image and text match.

Shapes: B rows, T tokens, N regions, D width of a region's features, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from mmtune.models.objectives.negatives import other_rows

IGNORED = -100


@dataclass(frozen=True)
class TokenMasking:
    """How tokens are masked.

    Attributes:
        mask_id: The token that stands for a hidden one.
        vocabulary: Number of token ids; random ones are drawn below it.
        rate: Share of the tokens to predict.
    """

    mask_id: int
    vocabulary: int
    rate: float = 0.15


def mask_tokens(
    input_ids_BT: torch.Tensor, maskable_BT: torch.Tensor, masking: TokenMasking, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids to read and labels to predict, both ``(B, T)``; labels are -100 where nothing is asked.

    BERT's rule: of the chosen tokens 80 % become the mask, 10 % a random token, 10 % stay.

    Args:
        input_ids_BT: True ids.
        maskable_BT: False at padding, control and media tokens.
        masking: The rule's numbers.
        generator: On the CPU, so every device draws the same.
    """
    device = input_ids_BT.device
    chance, kind = torch.rand((2, *input_ids_BT.shape), generator=generator).to(device)
    random_ids = torch.randint(masking.vocabulary, input_ids_BT.shape, generator=generator).to(device)
    chosen = maskable_BT & (chance < masking.rate)
    read = input_ids_BT.masked_fill(chosen & (kind < 0.8), masking.mask_id)
    read = torch.where(chosen & (kind >= 0.8) & (kind < 0.9), random_ids, read)
    return read, input_ids_BT.masked_fill(~chosen, IGNORED)


def mask_regions(
    features_BND: torch.Tensor, valid_BN: torch.Tensor, generator: torch.Generator, *, rate: float = 0.15
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns features to read, ``(B, N, D)``, and which regions to predict, ``(B, N)``.

    Of the chosen regions 90 % are zeroed and 10 % stay.

    Args:
        features_BND: True features.
        valid_BN: False at padding.
        generator: On the CPU, so every device draws the same.
        rate: Share of the regions to predict.
    """
    chance, kind = torch.rand((2, *valid_BN.shape), generator=generator).to(features_BND.device)
    chosen = valid_BN & (chance < rate)
    return features_BND.masked_fill((chosen & (kind < 0.9))[..., None], 0.0), chosen


def masked_token_loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Returns the mean cross-entropy over the chosen tokens, 0 where none was."""
    chosen = labels_BT != IGNORED
    total = functional.cross_entropy(logits_BTV[chosen].float(), labels_BT[chosen], reduction="sum")
    return total / chosen.sum().clamp(min=1)


def masked_region_loss(
    predicted_BND: torch.Tensor, features_BND: torch.Tensor, chosen_BN: torch.Tensor
) -> torch.Tensor:
    """Returns the mean squared norm of the error over the chosen regions, 0 where none was."""
    error_BN = (predicted_BND - features_BND).square().sum(-1)
    return error_BN.masked_fill(~chosen_BN, 0.0).sum() / chosen_BN.sum().clamp(min=1)


def match_pairs(
    group_B: torch.Tensor, generator: torch.Generator, able_BB: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns which row's media to show beside each text, and whether they match, both ``(B,)``.

    Half of the rows, by chance, get the media of another group of the batch.

    Args:
        group_B: Integers; rows of one group share their media.
        generator: On the CPU, so every device draws the same.
        able_BB: Bool: whose media each row can be shown with; None for all.
    """
    swap_B = (torch.rand(group_B.shape, generator=generator) < 0.5).to(group_B.device)
    other_B, found_B = other_rows(group_B, generator, able_BB)
    swap_B = swap_B & found_B
    rows = torch.arange(len(group_B), device=group_B.device)
    return torch.where(swap_B, other_B, rows), ~swap_B


def match_loss(logits_B: torch.Tensor, matched_B: torch.Tensor) -> torch.Tensor:
    """Returns the mean binary cross-entropy of "image and text belong together"."""
    return functional.binary_cross_entropy_with_logits(logits_B.float(), matched_B.float())
