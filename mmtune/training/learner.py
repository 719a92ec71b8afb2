"""A composite model with the heads of its pretraining objectives: one weighted loss out of named parts.

Shapes: B rows, T tokens, M media tokens, H model width, K parts of a row, C width of a code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmtune.models.composite.encoded import (
    MEDIA_INPUTS,
    EncodedMedia,
    encode_media,
    outputs,
    summaries,
    summary_widths,
)
from mmtune.models.objectives.weighted import check_weights, weighted_sum
from mmtune.models.towers import tower_of
from mmtune.training.code_losses import CodeHeads, code_losses
from mmtune.training.loss import answer_loss
from mmtune.training.pair_losses import MaskingHeads, MatchHead, TextMasking, masked_loss, match_loss_of
from mmtune.training.tally import Tally

CODED = ("reconstruction", "adversarial", "contrastive")
"""Objectives over one code per part of a row."""
_OURS = ("keys", "step")


@dataclass(frozen=True)
class LearnerSettings:
    """What a learner minimises.

    Attributes:
        weights: By objective, all above 0.
        parts: Of image, audio and text, those that have a code.
        code_width: C.
        code_dropout: Chance of a part to be kept from the joint code.
        masking: How text is masked, for ``masked``.
        seed: Of the heads.
        frozen_steps: Steps for which a tower stays frozen first.
    """

    weights: Mapping[str, float]
    parts: tuple[str, ...]
    code_width: int
    code_dropout: float
    masking: TextMasking | None
    seed: int
    frozen_steps: Mapping[str, int]


class Learner(nn.Module):
    """A composite model, the heads of its objectives, and what they have lost since the last line of metrics."""

    def __init__(self, model: Any, settings: LearnerSettings) -> None:
        """Makes the heads, each from its own seed: one more objective changes no other's start.

        Args:
            model: ``CompositeForConditionalGeneration``.
            settings: What is minimised.

        Raises:
            RecipeError: The weights do not do, or a code is wider than what it is made from.
        """
        super().__init__()
        check_weights(settings.weights)
        self.model, self.settings, self.tally = model, settings, Tally()
        width, weights = model.config.text_config.hidden_size, settings.weights
        heads: dict[str, nn.Module] = {}
        if set(CODED) & set(weights):
            targets = {name: own for name, own in summary_widths(model.config).items() if name in settings.parts}
            heads["codes"] = _seeded(
                settings.seed, lambda: CodeHeads(weights, settings.parts, width, settings.code_width, targets)
            )
        if "masked" in weights:
            heads["masked"] = _seeded(settings.seed, lambda: MaskingHeads(width))
        if "match" in weights:
            heads["match"] = _seeded(settings.seed, lambda: MatchHead(width))
        self.heads = nn.ModuleDict(heads)
        self._staged = {
            name: parameter
            for name, parameter in model.named_parameters()
            if tower_of(name) in settings.frozen_steps and parameter.requires_grad
        }

    def thaw(self) -> None:
        """Lets every parameter of a staged tower train, for saving and loading them all."""
        for parameter in self._staged.values():
            parameter.requires_grad_(True)

    def _stage(self, step: int) -> None:
        for name, parameter in self._staged.items():
            parameter.requires_grad_(step >= self.settings.frozen_steps[tower_of(name)])

    def losses(self, batch: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, float], int]:
        """Returns every objective's loss by name, facts to log, and the number of label tokens.

        Args:
            batch: As ``PairedBatches`` makes it.
        """
        weights, facts = self.settings.weights, dict[str, float]()
        inputs = {name: value for name, value in batch.items() if name not in _OURS}
        media: dict[str, EncodedMedia] = {}
        if set(weights) != {"caption"}:
            media = encode_media(self.model.model, inputs)
        found: dict[str, torch.Tensor] = {}
        count = int((batch["labels"][:, 1:] != -100).sum())
        if "caption" in weights:
            given = with_features(inputs, {name: own.features for name, own in media.items()}) if media else inputs
            nll, count = answer_loss(self.model, given)
            found["caption"] = nll / max(count, 1)
        if "codes" in self.heads:
            pooled, present_BK = self._pooled(inputs, media)
            made = code_losses(
                self.heads["codes"],
                pooled,
                present_BK,
                summaries(inputs, media, len(present_BK)),
                batch["keys"],
                self.settings.code_dropout if self.training else 0.0,
            )
            found, facts = found | made[0], facts | made[1]
        if "masked" in self.heads:
            assert self.settings.masking is not None
            found["masked"], own = masked_loss(self.model, self.heads["masked"], inputs, media, self.settings.masking)
            facts |= own
        if "match" in self.heads:
            found["match"], own = match_loss_of(self.model, self.heads["match"], inputs, media, batch["keys"])
            facts |= own
        return found, facts, count

    def _pooled(
        self, inputs: Mapping[str, torch.Tensor], media: Mapping[str, EncodedMedia]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Returns ``(B, H)`` by part, and ``(B, K)`` which rows have it."""
        rows, parts = len(inputs["input_ids"]), self.settings.parts
        nothing = torch.zeros(rows, dtype=torch.bool, device=inputs["input_ids"].device)
        present = {name: own.present(rows) for name, own in media.items() if name in parts}
        pooled = {name: own.pooled(rows) for name, own in media.items() if name in parts}
        if "text" in parts:
            pooled["text"], present["text"] = answer_vectors(self.model.model, inputs["labels"])
        return pooled, torch.stack([present.get(name, nothing) for name in parts], dim=1)

    def loss(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Returns the weighted sum of the objectives times the label tokens, and their number, as the loop takes it.

        While training, the parts are added to the line of metrics, and staged towers freeze or thaw.
        """
        if self.training:
            self._stage(int(batch["step"]))
        found, facts, count = self.losses(batch)
        total = weighted_sum(found, self.settings.weights)
        if self.training:
            self.tally.add({f"loss_{name}": float(own.detach()) for name, own in found.items()} | facts, count)
        return total * count, count

    def held_out_loss(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Returns ``loss`` with the same draws whenever it is asked for."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            return self.loss(batch)


def with_features(inputs: Mapping[str, torch.Tensor], features: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Returns a composite model's inputs with features ``(M, H)`` by modality in place of media."""
    rest = {name: value for name, value in inputs.items() if name not in MEDIA_INPUTS}
    return {**rest, "mm_encoder_outputs": outputs(features)} if features else rest


def answer_vectors(model: Any, labels_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``(B, H)`` the mean hidden state of each row's answer, read alone, and ``(B,)`` which rows have one.

    Args:
        model: A ``CompositeModel``.
        labels_BT: -100 outside the answers.
    """
    counts_B = (labels_BT != -100).sum(1)
    longest = max(int(counts_B.max()), 1)
    order_BA = (labels_BT == -100).byte().argsort(dim=1, stable=True)[:, :longest]
    inside_BA = torch.arange(longest, device=labels_BT.device) < counts_B[:, None]
    # A row without an answer reads its padding; what comes of it is not counted.
    ids_BA = labels_BT.gather(1, order_BA).masked_fill(~inside_BA, 0)
    seen_BA = inside_BA.clone()
    seen_BA[:, 0] = True
    hidden = model(
        input_ids=ids_BA, attention_mask=seen_BA.long(), prompt_mask=seen_BA.long(), use_cache=False
    ).last_hidden_state.float()
    weights = inside_BA[..., None].float()
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1), counts_B > 0


def _seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
