"""A composite model with the heads of its pretraining objectives: one weighted loss out of named parts.

Shapes: B rows, T tokens, M media tokens, H model width, K parts of a row, C width of a code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
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
    word_summary,
)
from mmtune.models.objectives.tasks import by_task
from mmtune.models.objectives.weighted import check_weights, weighted_sum
from mmtune.models.towers import tower_of
from mmtune.training.code_losses import CodeHeads, code_losses
from mmtune.training.ledger import Ledger, Said
from mmtune.training.loss import answer_loss, answer_losses
from mmtune.training.pair_losses import MaskingHeads, MatchHead, TextMasking, masked_loss, match_loss_of
from mmtune.training.paired import belonging_together
from mmtune.training.unfreezing import Unfreezing

CODED = ("reconstruction", "adversarial", "contrastive")
"""Objectives over one code per part of a row."""
_OURS = ("keys", "step", "tasks", "together")


@dataclass(frozen=True)
class CodeSettings:
    """How a row's parts become codes.

    Attributes:
        parts: Of image, audio, behaviour and text, those that have a code.
        width: C.
        dropout: Chance of a part to be kept from the joint code.
        alternating: The players of the games move in turns.
        form: Of the loss in the encoders' turn.
        noise: Deviation of the noise through which the discriminator sees codes.
        sources: Whose rows codes are learned from, which ``together`` tells row by row; empty for all.
        feature_noise: Deviation of the noise on features before codes are made of them.
        sphere: Codes are all of one length.
        gradient_penalty: Weight of what the discriminator pays for steep answers.
    """

    parts: tuple[str, ...] = ()
    width: int = 32
    dropout: float = 0.0
    alternating: bool = False
    form: str = "non_saturating"
    noise: float = 0.0
    sources: tuple[str, ...] = ()
    feature_noise: float = 0.0
    sphere: bool = False
    gradient_penalty: float = 0.0


@dataclass(frozen=True)
class LearnerSettings:
    """What a learner minimises.

    Attributes:
        weights: By objective, all above 0.
        codes: For the objectives over codes.
        text: What is a word and how words are masked.
        seed: Of the heads.
        frozen_steps: Steps for which a tower stays frozen first.
        tasks: Weight of each task's label tokens by its name, in the order of the batches' numbers; empty where there
            is one task.
    """

    weights: Mapping[str, float]
    codes: CodeSettings
    text: TextMasking
    seed: int
    frozen_steps: Mapping[str, int]
    tasks: Mapping[str, float] = field(default_factory=dict)


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
        self.model, self.settings, self.ledger = model, settings, Ledger()
        self._said: Said = []
        self._apart = bool(model.config.fusion["auxiliary_loss"])
        width, weights, codes = model.config.text_config.hidden_size, settings.weights, settings.codes
        heads: dict[str, Callable[[], nn.Module]] = {}
        if set(CODED) & set(weights):
            targets = {name: own for name, own in summary_widths(model.config).items() if name in codes.parts}
            rules: Any = {
                "alternating": codes.alternating,
                "form": codes.form,
                "noise": codes.noise,
                "feature_noise": codes.feature_noise,
                "sphere": codes.sphere,
                "gradient_penalty": codes.gradient_penalty,
            }
            heads["codes"] = partial(CodeHeads, weights, codes.parts, width, codes.width, targets, **rules)
        if "masked" in weights:
            heads["masked"] = partial(MaskingHeads, width)
        if "match" in weights:
            heads["match"] = partial(MatchHead, width)
        self.heads = nn.ModuleDict({name: _seeded(settings.seed, make) for name, make in heads.items()})
        self._unfreezing = Unfreezing(model, settings.frozen_steps, part_of)

    def thaw(self) -> None:
        """Lets every parameter of a staged tower train, for saving and loading them all."""
        self._unfreezing.thaw()

    @torch.no_grad()
    def measure(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Takes what codes are made of, and what is decoded, in some batches as the standard of both."""
        heads: Any = self.heads["codes"]
        found: dict[tuple[str, str], list[torch.Tensor]] = {}
        for batch in batches:
            inputs, media = self._encoded(batch)
            pooled, present_BK = self._pooled(inputs, media)
            present_BK = belonging_together(present_BK, batch)
            for kind, values in (("seen", pooled), ("told", self._told(inputs, media))):
                for name, own in values.items():
                    found.setdefault((kind, name), []).append(own[heads.at(name, present_BK)].float())
        for (kind, name), parts in found.items():
            if sum(map(len, parts)):
                take = heads.told[name].measure if kind == "told" else partial(heads.measure, name)
                take(torch.cat(parts))

    def _encoded(self, batch: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, EncodedMedia]]:
        inputs = {name: value for name, value in batch.items() if name not in _OURS}
        return inputs, encode_media(self.model.model, inputs)

    def losses(self, batch: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, float], int]:
        """Returns every objective's loss by name, facts to log, and the number of label tokens.

        Args:
            batch: As a ``PairCollator`` makes it, with ``step``, ``tasks`` where there are several, and ``together``
                where codes are learned from some rows alone.
        """
        weights, facts = self.settings.weights, dict[str, float]()
        inputs = {name: value for name, value in batch.items() if name not in _OURS}
        media: dict[str, EncodedMedia] = {}
        if set(weights) != {"caption"}:
            inputs, media = self._encoded(batch)
        found: dict[str, torch.Tensor] = {}
        count = int((batch["labels"][:, 1:] != -100).sum())
        if "caption" in weights:
            # A resampler that reads the question does so for the answers alone, so the towers run again.
            config = self.model.config
            reused = media and not any(config.resampler_reads(name) for name in config.modalities)
            given = with_features(inputs, {name: own.features for name, own in media.items()}) if reused else inputs
            found["caption"] = self._caption(given, batch.get("tasks"))
        if "codes" in self.heads:
            pooled, present_BK = self._pooled(inputs, media)
            present_BK = belonging_together(present_BK, batch)
            dropout = self.settings.codes.dropout if self.training else 0.0
            told, step = self._told(inputs, media), int(batch["step"])
            made = code_losses(self.heads["codes"], pooled, present_BK, told, batch["keys"], dropout, step)
            found, facts = found | made[0], facts | made[1]
        if "masked" in self.heads:
            found["masked"], own = masked_loss(self.model, self.heads["masked"], inputs, media, self.settings.text)
            facts |= own
        if "match" in self.heads:
            found["match"], own = match_loss_of(self.model, self.heads["match"], inputs, media, batch["keys"])
            facts |= own
        return found, facts, count

    def _caption(self, given: Mapping[str, torch.Tensor], tasks_B: torch.Tensor | None) -> torch.Tensor:
        """Returns the sum of the weighted losses of the label tokens over their number, and notes its parts."""
        self._said = []
        if tasks_B is None and not self._apart:
            nll, count = answer_loss(self.model, given)
            return nll / max(count, 1)
        losses_N, row_N, self._said = answer_losses(self.model, given)
        if tasks_B is not None:
            weights_N, by_name = by_task(losses_N, tasks_B[row_N], self.settings.tasks)
            losses_N, self._said = losses_N * weights_N, [*self._said, *by_name]
        return losses_N.sum() / max(losses_N.numel(), 1)

    def pooled(self, batch: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Returns ``(B, H)`` the mean feature of every part, and ``(B, K)`` which rows have it."""
        return self._pooled(*self._encoded(batch))

    def _pooled(
        self, inputs: Mapping[str, torch.Tensor], media: Mapping[str, EncodedMedia]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Returns ``(B, H)`` by part, and ``(B, K)`` which rows have it."""
        rows, parts = len(inputs["input_ids"]), self.settings.codes.parts
        nothing = torch.zeros(rows, dtype=torch.bool, device=inputs["input_ids"].device)
        present = {name: own.present(rows) for name, own in media.items() if name in parts}
        pooled = {name: own.pooled(rows) for name, own in media.items() if name in parts}
        if "text" in parts:
            words_BT = self.settings.text.words(inputs)
            pooled["text"], present["text"] = text_vectors(self.model.model, inputs["input_ids"], words_BT)
        return pooled, torch.stack([present.get(name, nothing) for name in parts], dim=1)

    def _told(self, inputs: Mapping[str, torch.Tensor], media: Mapping[str, EncodedMedia]) -> dict[str, torch.Tensor]:
        """Returns ``(B, D)`` what is decoded, by part."""
        if "reconstruction" not in self.settings.weights:
            return {}
        parts, ids_BT = self.settings.codes.parts, inputs["input_ids"]
        found = {
            name: own for name, own in summaries(self.model.config, inputs, media, len(ids_BT)).items() if name in parts
        }
        if "text" in parts:
            found["text"] = word_summary(ids_BT, self.settings.text.words(inputs))
        return found

    def loss(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Returns the weighted sum of the objectives times the label tokens, and their number, as the loop takes it.

        The parts go into the ledger. While training, staged towers freeze or thaw.
        """
        if self.training:
            self._unfreezing.at(int(batch["step"]))
        found, facts, count = self.losses(batch)
        total = weighted_sum(found, self.settings.weights)
        facts = {f"loss_{name}": float(own.detach()) for name, own in found.items()} | facts
        self.ledger.say([(facts, float(count)), *self._said], training=self.training)
        return total * count, count

    def held_out_loss(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Returns ``loss`` with the same draws whenever it is asked for."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            return self.loss(batch)


def part_of(name: str) -> str:
    """Returns the tower of a parameter of a composite model, or of a learner by its name there.

    What joins the parts, such as a gate, is ``fusion``, and a head of an objective ``heads``.
    """
    if name.startswith("heads."):
        return "heads"
    return tower_of(name)


def with_features(inputs: Mapping[str, torch.Tensor], features: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Returns a composite model's inputs with features ``(M, H)`` by modality in place of media."""
    rest = {name: value for name, value in inputs.items() if name not in MEDIA_INPUTS}
    return {**rest, "mm_encoder_outputs": outputs(features)} if features else rest


def text_vectors(model: Any, ids_BT: torch.Tensor, words_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``(B, H)`` the mean hidden state of each row's words, read alone, and ``(B,)`` which rows have any.

    Args:
        model: A ``CompositeModel``.
        ids_BT: Token ids.
        words_BT: Which of them are read.
    """
    counts_B = words_BT.sum(1)
    longest = max(int(counts_B.max()), 1)
    order_BA = (~words_BT).byte().argsort(dim=1, stable=True)[:, :longest]
    inside_BA = torch.arange(longest, device=ids_BT.device) < counts_B[:, None]
    # A row without a word reads its padding; what comes of it is not counted.
    read_BA = ids_BT.gather(1, order_BA).masked_fill(~inside_BA, 0)
    seen_BA = inside_BA.clone()
    seen_BA[:, 0] = True
    hidden = model(
        input_ids=read_BA, attention_mask=seen_BA.long(), prompt_mask=seen_BA.long(), use_cache=False
    ).last_hidden_state.float()
    weights = inside_BA[..., None].float()
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1), counts_B > 0


def _seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
