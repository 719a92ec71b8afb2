"""Losses over one code per part of a row: reconstruction, contrast, and the games over codes.

Shapes: B rows, K parts of a row (image, audio, behaviour, text), H model width, C width of a code, D numbers of a
summary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations, permutations
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mmtune.models.fusion.gate import modality_dropout
from mmtune.models.objectives.autoencoder import Autoencoder
from mmtune.models.objectives.contrastive import Temperature, contrastive_loss
from mmtune.training.code_game import GameHeads, game_losses, on_sphere, through_noise
from mmtune.training.paired import PARTS
from mmtune.training.standard import Standard


class CodeHeads(nn.Module):
    """An encoder from pooled features to the code of every part, and what each objective reads codes with."""

    def __init__(
        self,
        objectives: Collection[str],
        parts: Sequence[str],
        width: int,
        code_width: int,
        target_widths: Mapping[str, int],
        *,
        alternating: bool = False,
        form: str = "non_saturating",
        noise: float = 0.0,
        feature_noise: float = 0.0,
        sphere: bool = False,
        gradient_penalty: float = 0.0,
    ) -> None:
        """Makes random heads.

        Args:
            objectives: Of reconstruction, adversarial and contrastive, those that count.
            parts: The parts that have a code.
            width: H.
            code_width: C.
            target_widths: D by part, for reconstruction.
            alternating: See ``GameHeads``.
            form: See ``GameHeads``.
            noise: See ``GameHeads``.
            feature_noise: Deviation of the Gaussian noise on what is encoded while training, whose own is 1.
            sphere: Codes, filled-in ones too, are all of one length, the root of C.
            gradient_penalty: See ``GameHeads``.

        Raises:
            RecipeError: The code is wider than all features together.
        """
        super().__init__()
        self.parts, self.feature_noise, self.sphere = tuple(parts), feature_noise, sphere
        decoded = dict(target_widths) if "reconstruction" in objectives else {}
        self.seen = nn.ModuleDict({name: Standard(width) for name in parts})
        self.told = nn.ModuleDict({name: Standard(own) for name, own in decoded.items()})
        self.coded = nn.ModuleDict({name: Standard(code_width) for name in parts})
        self.autoencoder = Autoencoder(dict.fromkeys(parts, width), code_width, 2 * code_width, decoded)
        self.temperature = Temperature() if "contrastive" in objectives else None
        rules: Any = {
            "alternating": alternating,
            "form": form,
            "noise": noise,
            "sphere": sphere,
            "gradient_penalty": gradient_penalty,
        }
        self.game = GameHeads(parts, code_width, **rules) if "adversarial" in objectives else None

    def at(self, name: str, present_BK: torch.Tensor) -> torch.Tensor:
        """Returns ``(B,)`` which rows have a part."""
        return present_BK[:, self.parts.index(name)]

    def read(self, pooled: Mapping[str, torch.Tensor], present_BK: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns ``(B, H)`` what is encoded by part: the features by the standard of their batch, in training noisy.

        Towers that know the training media say of new ones what varies more. Noise gives encoders features from around
        those they have, as in denoising autoencoders (Vincent et al. 2008), so that codes of new media lie where those
        of training media do.
        """
        deviation = self.feature_noise if self.training else 0.0
        found = {}
        for name, own in pooled.items():
            standard: Any = self.seen[name]
            found[name] = through_noise(standard.of_batch(own, self.at(name, present_BK)), deviation)
        return found

    def codes(self, read: Mapping[str, torch.Tensor], present_BK: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns ``(B, C)`` the code by part, each number by the standard of its batch.

        Where a part's codes lie and how large they are would tell the part at once, and neither says anything of a row.
        """
        found = {}
        for name, own in read.items():
            standard: Any = self.coded[name]
            made_BC = standard.of_batch(self.autoencoder.encoders[name](own), self.at(name, present_BK))
            found[name] = on_sphere(made_BC) if self.sphere else made_BC
        return found

    def code(self, name: str, pooled_BH: torch.Tensor) -> torch.Tensor:
        """Returns ``(B, C)`` the code of a part by the standards that were measured, whatever else is in the batch."""
        made: torch.Tensor = self.coded[name](self.autoencoder.encoders[name](self.seen[name](pooled_BH)))
        return on_sphere(made) if self.sphere else made

    def measure(self, name: str, pooled_NH: torch.Tensor) -> None:
        """Takes the features of some rows, and what the encoder makes of them, as the standards of a part."""
        seen: Any = self.seen[name]
        coded: Any = self.coded[name]
        seen.measure(pooled_NH)
        coded.measure(self.autoencoder.encoders[name](seen(pooled_NH)))


def code_losses(
    heads: Any,
    pooled: Mapping[str, torch.Tensor],
    present_BK: torch.Tensor,
    targets: Mapping[str, torch.Tensor],
    keys_BP: torch.Tensor,
    dropout: float,
    step: int,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Returns losses by objective, and facts to log.

    Args:
        heads: ``CodeHeads``.
        pooled: ``(B, H)`` by part.
        present_BK: What each row has, a column per part of the heads.
        targets: ``(B, D)`` by part.
        keys_BP: Of a ``PairCollator``.
        dropout: Chance of a part to be kept from the joint code.
        step: Of the training, -1 outside of it.
    """
    losses: dict[str, torch.Tensor] = {}
    facts: dict[str, float] = {}
    codes = heads.codes(heads.read(pooled, present_BK), present_BK)
    if len(heads.told):
        losses["reconstruction"], own = _reconstruction(heads, codes, present_BK, targets, dropout)
        facts |= own
    at = {name: heads.at(name, present_BK) for name in codes}
    if heads.game is not None:
        losses["adversarial"], own = game_losses(heads.game, codes, at, step)
        facts |= own
    if heads.temperature is not None:
        losses["contrastive"], own = _contrast(heads, codes, at, keys_BP)
        facts |= own
    return losses, facts


def _reconstruction(
    heads: Any,
    codes: Mapping[str, torch.Tensor],
    present_BK: torch.Tensor,
    targets: Mapping[str, torch.Tensor],
    dropout: float,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Returns the sum over parts of the squared error, and the error of each, also from another alone.

    The error of a part is that of its standardised numbers, of 1 where the mean is always guessed.
    """
    told = {name: heads.told[name](own) for name, own in targets.items() if name in heads.told}
    kept_BK = modality_dropout(present_BK, dropout, torch.default_generator) if dropout else present_BK
    code_BC = heads.autoencoder.join(codes, kept_BK)
    errors = heads.autoencoder.mean_errors(heads.autoencoder.errors_of(code_BC, told, present_BK), present_BK)
    each = {name: error / (told[name].shape[-1] * heads.told[name].spread) for name, error in errors.items()}
    facts = {f"reconstruction_{name}": float(own.detach()) for name, own in each.items()}
    with torch.no_grad():
        for one, other in permutations(told, 2):
            both = heads.at(one, present_BK) & heads.at(other, present_BK)
            if bool(both.any()):
                made = heads.autoencoder.decoders[other](codes[one][both])
                error = (made - told[other][both]).square().mean() / heads.told[other].spread
                facts[f"cross_{one}_{other}"] = float(error)
    return (torch.stack(list(each.values())).sum() if each else _nothing(present_BK)), facts


def _contrast(
    heads: Any, codes: Mapping[str, torch.Tensor], at: Mapping[str, torch.Tensor], keys_BP: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """Returns the mean loss over pairs of parts, and per ordered pair the share of rows that find their own."""
    losses, facts = [], {}
    for one, other in combinations(codes, 2):
        both = at[one] & at[other]
        if int(both.sum()) > 1:
            same_BB = same_rows(keys_BP[both], one, other)
            sides = {one: codes[one][both], other: codes[other][both]}
            losses.append(contrastive_loss(sides[one], sides[other], heads.temperature(), same_BB))
            for asking, answering in ((one, other), (other, one)):
                facts[f"recall_{asking}_{answering}"] = _recall(sides[asking], sides[answering], same_BB)
    return (torch.stack(losses).mean() if losses else _nothing(keys_BP)), facts


def same_rows(keys_BP: torch.Tensor, one: str, other: str) -> torch.Tensor:
    """Returns bool ``(B, B)``: which rows share the one part or the other, and so fit each other as well.

    Args:
        keys_BP: Of a ``PairCollator``.
        one: A part.
        other: Another one.
    """
    columns = [keys_BP[:, PARTS.index(name)] for name in (one, other)]
    return torch.stack([own[:, None] == own[None] for own in columns]).any(0)


@torch.no_grad()
def _recall(asking_BC: torch.Tensor, answering_BC: torch.Tensor, same_BB: torch.Tensor) -> float:
    asking, answering = (functional.normalize(own.float(), dim=-1) for own in (asking_BC, answering_BC))
    nearest_B1 = (asking @ answering.T).argmax(1, keepdim=True)
    return float(same_BB.gather(1, nearest_B1).float().mean())


def _nothing(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), device=like.device)
