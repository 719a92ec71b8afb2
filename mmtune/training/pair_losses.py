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
) -> torch.Tensor:
    """Returns hidden states ``(B, T, H)`` of whole rows as one prompt."""
    kept = {name: value for name, value in inputs.items() if name not in (*MEDIA_INPUTS, "labels", "input_ids")}
    kept["prompt_mask"] = inputs["attention_mask"]
    made = model.model(input_ids=ids, mm_encoder_outputs=outputs(features), use_cache=False, **kept)
    hidden: torch.Tensor = made.last_hidden_state
    return hidden


def masked_loss(
    model: Any,
    heads: Any,
    inputs: Mapping[str, torch.Tensor],
    media: Mapping[str, EncodedMedia],
    masking: TextMasking,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Returns the loss of finding hidden words, plus that of hidden media where they stand in the sequence.

    Args:
        model: The composite model.
        heads: ``MaskingHeads``.
        inputs: A padded batch.
        media: Its encoded media.
        masking: How text is masked.
    """
    ids, special = inputs["input_ids"], torch.tensor(masking.special_ids, device=inputs["input_ids"].device)
    words = inputs["attention_mask"].bool() & ~torch.isin(ids, special)
    rule = TokenMasking(masking.mask_id, masking.vocabulary)
    read, labels = mask_tokens(ids, words, rule, torch.default_generator)
    # A random token must not open a medium.
    read = torch.where(words & torch.isin(read, special), masking.mask_id, read)
    features = {name: own.features for name, own in media.items()}
    in_sequence = model.config.fusion["attention"] in ("none", "self")
    chosen: dict[str, torch.Tensor] = {}
    if in_sequence:
        for name, own in list(features.items()):
            every = torch.ones(1, len(own), dtype=torch.bool, device=own.device)
            hidden, picked = mask_regions(own[None], every, torch.default_generator)
            features[name], chosen[name] = hidden[0], picked
    hidden_BTH = _read(model, inputs, read, features)
    states = heads.norm(functional.gelu(heads.word(hidden_BTH[labels != -100])))
    loss = masked_token_loss(model.lm_head(states)[None], labels[labels != -100][None])
    facts = {"masked_words": float(loss.detach())}
    for name, picked in chosen.items():
        at = model.model.placeholders(name, ids, hidden_BTH)
        guessed, true = heads.region(hidden_BTH[at]), media[name].features.detach()
        own = masked_region_loss(guessed[None].float(), true[None].float(), picked) / true.shape[-1]
        facts[f"masked_{name}"] = float(own.detach())
        loss = loss + own
    return loss, facts


def match_loss_of(
    model: Any,
    head: Any,
    inputs: Mapping[str, torch.Tensor],
    media: Mapping[str, EncodedMedia],
    keys_BP: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Returns the loss of telling a row with its own media from one with another row's, and the accuracy.

    A row takes the media of one that has as many tokens of each; others keep their own.

    Args:
        model: The composite model.
        head: ``MatchHead``.
        inputs: A padded batch.
        media: Its encoded media.
        keys_BP: From ``PairedBatches``.
    """
    rows = len(keys_BP)
    if not media:
        return torch.zeros((), device=keys_BP.device), {}
    own_BK = keys_BP[:, [PARTS.index(name) for name in media]]
    _, group_B = torch.unique(own_BK, dim=0, return_inverse=True)
    from_B, _ = match_pairs(group_B, torch.default_generator)
    counts_KB = torch.stack([torch.bincount(own.row_of_token, minlength=rows) for own in media.values()])
    here_B = torch.arange(rows, device=from_B.device)
    from_B = torch.where((counts_KB == counts_KB[:, from_B]).all(0), from_B, here_B)
    features = {}
    for (name, own), counts_B in zip(media.items(), counts_KB, strict=True):
        starts_B = counts_B.cumsum(0) - counts_B
        place_M = torch.arange(len(own.features), device=from_B.device) - starts_B[own.row_of_token]
        features[name] = own.features[starts_B[from_B[own.row_of_token]] + place_M]
    hidden_BTH = _read(model, inputs, inputs["input_ids"], features)
    last_B = inputs["attention_mask"].sum(1) - 1
    logits_B = head.outer(hidden_BTH[here_B, last_B])[:, 0]
    matched_B = from_B == here_B
    accuracy = float(((logits_B.detach() > 0) == matched_B).float().mean())
    return match_loss(logits_B, matched_B), {"match_accuracy": accuracy}
