"""Losses over one code per part of a row: reconstruction, the game over modalities, and contrast.

Shapes: B rows, K parts of a row (image, audio, text), H model width, C width of a code, D numbers of a summary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mmtune.models.fusion.gate import modality_dropout
from mmtune.models.objectives.adversarial import Discriminator, discriminator_loss, game_facts, reverse_gradient
from mmtune.models.objectives.autoencoder import Autoencoder
from mmtune.models.objectives.contrastive import Temperature, contrastive_loss
from mmtune.training.paired import PARTS

_SMOOTHING = 0.1


class CodeHeads(nn.Module):
    """An encoder from pooled features to the code of every part, and what each objective reads codes with."""

    def __init__(
        self,
        objectives: Collection[str],
        parts: Sequence[str],
        width: int,
        code_width: int,
        target_widths: Mapping[str, int],
    ) -> None:
        """Makes random heads.

        Args:
            objectives: Of reconstruction, adversarial and contrastive, those that count.
            parts: The parts that have a code.
            width: H.
            code_width: C.
            target_widths: D by modality, for reconstruction.

        Raises:
            RecipeError: The code is wider than all features together.
        """
        super().__init__()
        self.parts = tuple(parts)
        decoded = target_widths if "reconstruction" in objectives else {}
        self.autoencoder = Autoencoder(dict.fromkeys(parts, width), code_width, 2 * code_width, decoded)
        self.rebuilds = bool(decoded)
        self.discriminator = Discriminator(code_width, len(parts)) if "adversarial" in objectives else None
        self.temperature = Temperature() if "contrastive" in objectives else None


def code_losses(
    heads: Any,
    pooled: Mapping[str, torch.Tensor],
    present_BK: torch.Tensor,
    targets: Mapping[str, torch.Tensor],
    keys_BP: torch.Tensor,
    dropout: float,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Returns losses by objective, and facts to log.

    Args:
        heads: ``CodeHeads``.
        pooled: ``(B, H)`` by part.
        present_BK: What each row has, a column per part of the heads.
        targets: ``(B, D)`` by modality.
        keys_BP: From ``PairedBatches``.
        dropout: Chance of a part to be kept from the joint code.
    """
    losses: dict[str, torch.Tensor] = {}
    facts: dict[str, float] = {}
    if heads.rebuilds:
        kept_BK = modality_dropout(present_BK, dropout, torch.default_generator) if dropout else present_BK
        errors = heads.autoencoder.losses(pooled, present_BK, kept_BK, targets)
        # Per number, so that none counts for more because it has more of them.
        each = {name: error / targets[name].shape[-1] for name, error in errors.items()}
        losses["reconstruction"] = torch.stack(list(each.values())).sum() if each else _nothing(present_BK)
        facts |= {f"reconstruction_{name}": float(own.detach()) for name, own in each.items()}
    codes = {name: heads.autoencoder.encoders[name](own) for name, own in pooled.items()}
    at = {name: present_BK[:, heads.parts.index(name)] for name in codes}
    if heads.discriminator is not None:
        losses["adversarial"], own = _game(heads, codes, at)
        facts |= own
    if heads.temperature is not None:
        pairs = [
            contrastive_loss(
                codes[one][both], codes[other][both], heads.temperature(), _twins(keys_BP[both], one, other)
            )
            for one, other in combinations(codes, 2)
            if int((both := at[one] & at[other]).sum()) > 1
        ]
        losses["contrastive"] = torch.stack(pairs).mean() if pairs else _nothing(present_BK)
        facts |= _recalls(codes, at, keys_BP)
    return losses, facts


def _nothing(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), device=like.device)


def _game(
    heads: Any, codes: Mapping[str, torch.Tensor], at: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Returns the discriminator's loss, whose gradient reaches the encoders reversed, and where the game stands."""
    own = [(heads.parts.index(name), code[at[name]]) for name, code in codes.items()]
    codes_NC = torch.cat([code for _, code in own])
    part_N = torch.cat([torch.full((len(code),), index, device=codes_NC.device) for index, code in own])
    if not len(codes_NC):
        return _nothing(codes_NC), {}
    logits_NK = heads.discriminator(reverse_gradient(codes_NC))
    found = game_facts(logits_NK.detach(), part_N, codes_NC.detach(), heads.parts)
    facts = {"discriminator_accuracy": found.accuracy, "game_value": found.value}
    facts |= {f"code_variance_{name}": value for name, value in found.variance.items()}
    return discriminator_loss(logits_NK, part_N, smoothing=_SMOOTHING), facts


def _twins(keys_BP: torch.Tensor, one: str, other: str) -> torch.Tensor:
    """Returns ``(B,)`` groups of rows that share the one part or the other, also by way of a third row."""
    groups_B = torch.arange(len(keys_BP), device=keys_BP.device)
    columns = [keys_BP[:, PARTS.index(name)] for name in (one, other)]
    shared_BB = torch.stack([own[:, None] == own[None] for own in columns]).any(0)
    while True:
        least_B = torch.where(shared_BB, groups_B[None], len(groups_B)).amin(1)
        if torch.equal(least_B, groups_B):
            return groups_B
        groups_B = least_B


@torch.no_grad()
def _recalls(
    codes: Mapping[str, torch.Tensor], at: Mapping[str, torch.Tensor], keys_BP: torch.Tensor
) -> dict[str, float]:
    """Returns, per ordered pair of parts, the share of rows whose nearest code of the other part is their own."""
    found = {}
    for one, other in [pair for two in combinations(codes, 2) for pair in (two, two[::-1])]:
        both = at[one] & at[other]
        if int(both.sum()) > 1:
            asking, answering = (functional.normalize(codes[name][both].float(), dim=-1) for name in (one, other))
            nearest = (asking @ answering.T).argmax(1)
            key = keys_BP[both][:, PARTS.index(other)]
            found[f"recall_{one}_{other}"] = float((key[nearest] == key).float().mean())
    return found
