"""ViLBERT's objectives on a composite model of early fusion: hidden words and media, and what belongs together.

Shapes: B rows, T tokens, M media tokens, H model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mmtune.models.composite.encoded import MEDIA_INPUTS, EncodedMedia, outputs
from mmtune.models.objectives.masked import (
    TokenMasking,
    mask_regions,
    mask_tokens,
    masked_region_loss,
    masked_token_loss,
    match_loss,
    match_pairs,
)
from mmtune.training.paired import PARTS


@dataclass(frozen=True)
class TextMasking:
    """How text is masked.

    Attributes:
        mask_id: The token that stands for a hidden one.
        vocabulary: Number of token ids.
        special_ids: Control and media tokens: never hidden, never put in another's place.
    """

    mask_id: int
    vocabulary: int
    special_ids: tuple[int, ...]

    def words(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns bool ``(B, T)``: which tokens of a padded batch are words."""
        ids_BT = inputs["input_ids"]
        special = torch.tensor(self.special_ids, device=ids_BT.device)
        return inputs["attention_mask"].bool() & ~torch.isin(ids_BT, special)


class MaskingHeads(nn.Module):
    """From a hidden state in place of a word or a piece of media to what stood there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.word, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.region = nn.Linear(width, width)


class MatchHead(nn.Module):
    """From the last hidden state to whether media and text belong together."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.outer = nn.Linear(width, 1)


def _read(
    model: Any, inputs: Mapping[str, torch.Tensor], ids: torch.Tensor, features: Mapping[str, torch.Tensor]
) -> Any:
    """Returns what the model makes of whole rows as one prompt."""
    kept = {name: value for name, value in inputs.items() if name not in (*MEDIA_INPUTS, "labels", "input_ids")}
    kept["prompt_mask"] = inputs["attention_mask"]
    return model.model(input_ids=ids, mm_encoder_outputs=outputs(features), use_cache=False, **kept)


def masked_loss(
    model: Any,
    heads: Any,
    inputs: Mapping[str, torch.Tensor],
    media: Mapping[str, EncodedMedia],
    masking: TextMasking,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Returns the loss of finding hidden words, plus that of hidden media: of 1 where the mean is always guessed.

    Args:
        model: The composite model.
        heads: ``MaskingHeads``.
        inputs: A padded batch.
        media: Its encoded media.
        masking: How text is masked.
    """
    ids, words = inputs["input_ids"], masking.words(inputs)
    rule = TokenMasking(masking.mask_id, masking.vocabulary)
    read, labels = mask_tokens(ids, words, rule, torch.default_generator)
    # A random token must not open a medium.
    special = torch.tensor(masking.special_ids, device=ids.device)
    read = torch.where(words & torch.isin(read, special), masking.mask_id, read)
    features = {name: own.features for name, own in media.items()}
    # With cross-attention alone no text reaches the media, and nothing tells what was hidden.
    hides_media = model.config.fusion["attention"] != "cross"
    chosen: dict[str, torch.Tensor] = {}
    if hides_media:
        for name, own in list(features.items()):
            every = torch.ones(1, len(own), dtype=torch.bool, device=own.device)
            hidden, picked = mask_regions(own[None], every, torch.default_generator)
            features[name], chosen[name] = hidden[0], picked
    made = _read(model, inputs, read, features)
    hidden_BTH = made.last_hidden_state
    states = heads.norm(functional.gelu(heads.word(hidden_BTH[labels != -100])))
    loss = masked_token_loss(model.lm_head(states)[None], labels[labels != -100][None])
    facts = {"masked_words": float(loss.detach())}
    for name, picked in chosen.items():
        at = model.model.placeholders(name, ids, hidden_BTH)
        # Behind co-attention the media have a stream of their own.
        source_BTH = hidden_BTH if made.media_states is None else made.media_states
        guessed, true = heads.region(source_BTH[at]).float(), _standard(media[name].features.detach().float())
        own = masked_region_loss(guessed[None], true[None], picked) / true.shape[-1]
        facts[f"masked_{name}"] = float(own.detach())
        loss = loss + own
    return loss, facts


def _standard(features_MH: torch.Tensor) -> torch.Tensor:
    """Returns features less the batch's mean, over its deviation: what a tower says of all media is not guessed at."""
    deviation_H = features_MH.std(0, correction=0)
    return (features_MH - features_MH.mean(0)) / deviation_H.clamp(min=max(float(0.1 * deviation_H.mean()), 1e-6))


def match_loss_of(
    model: Any,
    head: Any,
    inputs: Mapping[str, torch.Tensor],
    media: Mapping[str, EncodedMedia],
    keys_BP: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Returns the loss of telling a row with its own media from one with another row's, and the accuracy.

    A row takes the media of one that has as many tokens of each; one without media is left out.

    Args:
        model: The composite model.
        head: ``MatchHead``.
        inputs: A padded batch.
        media: Its encoded media.
        keys_BP: Of a ``PairCollator``.
    """
    rows = len(keys_BP)
    if not media:
        return torch.zeros((), device=keys_BP.device), {}
    own_BK = keys_BP[:, [PARTS.index(name) for name in media]]
    _, group_B = torch.unique(own_BK, dim=0, return_inverse=True)
    counts_KB = torch.stack([torch.bincount(own.row_of_token, minlength=rows) for own in media.values()])
    has_B = counts_KB.sum(0) > 0
    able_BB = (counts_KB[:, :, None] == counts_KB[:, None]).all(0) & has_B
    from_B, matched_B = match_pairs(group_B, torch.default_generator, able_BB)
    features = {}
    for (name, own), counts_B in zip(media.items(), counts_KB, strict=True):
        starts_B = counts_B.cumsum(0) - counts_B
        place_M = torch.arange(len(own.features), device=from_B.device) - starts_B[own.row_of_token]
        features[name] = own.features[starts_B[from_B[own.row_of_token]] + place_M]
    hidden_BTH = _read(model, inputs, inputs["input_ids"], features).last_hidden_state
    last_B = inputs["attention_mask"].sum(1) - 1
    here_B = torch.arange(rows, device=last_B.device)
    logits_B = head.outer(hidden_BTH[here_B, last_B])[:, 0][has_B]
    accuracy = float(((logits_B.detach() > 0) == matched_B[has_B]).float().mean())
    return match_loss(logits_B, matched_B[has_B]), {"match_accuracy": accuracy}
