"""Features and text to what the language model runs on, for every mode and attention of fusion.

Shapes: B rows, T tokens, P passes, K branches, N media of a modality, M media tokens of a row, H width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mmtune.models.composite.config import MODALITIES, CompositeConfig
from mmtune.models.composite.head import gate_of_passes
from mmtune.models.composite.masks import both_ways, hide, instruction_so_far, is_padding, mean_of, sees, whole
from mmtune.models.composite.passes import (
    TEXT,
    FusionState,
    Passes,
    dropped,
    kind_of,
    pass_masks,
    places,
    plan_passes,
    present_at,
)
from mmtune.models.composite.stream import MediaStream


@dataclass(frozen=True)
class Row:
    """The tokens of a call.

    Attributes:
        words: ``(B, T, H)`` embeddings, media as their placeholders.
        kinds: ``(B, T)``, see ``passes.kind_of``.
        mask: The attention mask, any form.
        prompt: ``(B, T)`` tokens before the first answer, virtual ones included.
        turns: ``(B, T)`` k at the words of the k-th user's turn, -k elsewhere from there up to the next, 0 before.
        state: Of earlier tokens, or None at the start.
    """

    words: torch.Tensor
    kinds: torch.Tensor
    mask: Any
    prompt: torch.Tensor
    turns: torch.Tensor
    state: FusionState | None

    @property
    def said(self) -> torch.Tensor:
        """``(B, T)`` words of users: the instructions."""
        return (self.turns > 0) & (self.kinds == TEXT) & self.valid

    @property
    def valid(self) -> torch.Tensor:
        """``(B, T)`` tokens that are no padding, as far as the mask tells."""
        length = self.kinds.shape[1]
        if isinstance(self.mask, dict) or self.mask is None or not is_padding(self.mask):
            return torch.ones_like(self.kinds, dtype=torch.bool)
        return self.mask[:, -length:].bool()


@dataclass(frozen=True)
class Run:
    """What the language model is given, and what it takes to read its answer.

    Attributes:
        embeds: ``(B * P, T, H)``.
        mask: For them.
        row_mask: Of the B rows, nothing hidden from a pass.
        passes: Of the batch.
        log_gate: ``(B, T, K)`` of the branches; None where there is one.
        stream: Media beside the sequence, where attention is cross or co.
        state: For later tokens.
    """

    embeds: torch.Tensor
    mask: Any
    row_mask: Any
    passes: Passes
    log_gate: torch.Tensor | None
    stream: MediaStream | None
    state: FusionState

    @property
    def log_gate_of_passes(self) -> torch.Tensor | None:
        """``(B, T, P)``; None for one pass."""
        if self.log_gate is None or self.passes.count == 1:
            return None
        return gate_of_passes(self.log_gate, self.passes.of_branch, self.passes.count)

    def media_states(self) -> torch.Tensor | None:
        """Returns ``(B, T, H)`` the media stream behind co-attention at its tokens, of one pass; None without one."""
        if self.stream is None or self.stream.outgoing is None or self.passes.count > 1 or self.state.index is None:
            return None
        states, index = self.stream.outgoing, self.state.index
        # What stands behind the last medium goes to a place that is cut off.
        length = self.embeds.shape[1]
        at = index.masked_fill(index < 0, length)[..., None].expand_as(states)
        spread = states.new_zeros(len(states), length + 1, states.shape[-1])
        return spread.scatter(1, at, states)[:, :length]

    def finished(self, keep: bool) -> FusionState | None:
        """Returns the state for later tokens, where they will come."""
        if not keep:
            return None
        streams = dict(self.stream.incoming) if self.stream is not None else None
        return replace(self.state, streams=streams or self.state.streams)


def kinds_at(where: dict[str, torch.Tensor], words: torch.Tensor) -> torch.Tensor:
    """Returns ``(B, T)`` the kind of every token, see ``passes.kind_of``."""
    kinds = torch.zeros(words.shape[:2], dtype=torch.long, device=words.device)
    for modality, places_BT in where.items():
        kinds = kinds.masked_fill(places_BT, kind_of(modality))
    return kinds


def prompt_at(prompt_mask: torch.Tensor | None, words: torch.Tensor) -> torch.Tensor:
    """Returns ``(B, T)`` the tokens of the prompt; virtual tokens before it belong to it."""
    rows, length = words.shape[:2]
    if prompt_mask is None:
        return torch.ones(rows, length, dtype=torch.bool, device=words.device)
    return nn.functional.pad(prompt_mask.bool(), (length - prompt_mask.shape[1], 0), value=True)


def turns_at(user_turns: torch.Tensor | None, prompt_BT: torch.Tensor) -> torch.Tensor:
    """Returns ``(B, T)`` the turns of the tokens, see ``Row``; without any the prompt is the only one."""
    if user_turns is None:
        return prompt_BT.long() * 2 - 1
    return nn.functional.pad(user_turns, (prompt_BT.shape[1] - user_turns.shape[1], 0))


def without_dropped(config: CompositeConfig, row: Row, positions_BT: torch.Tensor | None) -> Row:
    """Returns the row as training sees it, with some modalities gone."""
    gone_BT = dropped(row.kinds, positions_BT, config.fusion["modality_dropout"], config.kinds)
    return replace(row, mask=hide(row.mask, gone_BT, row.kinds.shape[1]))


def asked_of_media(row: Row, modality_BT: torch.Tensor, tokens: int) -> torch.Tensor:
    """Returns ``(N, H)`` the embedding of the instruction that each medium stands with: of its turn's words.

    Args:
        row: The tokens.
        modality_BT: Where the modality's tokens stand.
        tokens: How many a medium takes.
    """
    rows_N, columns_N = (found[::tokens] for found in modality_BT.nonzero(as_tuple=True))
    seen_BTT = whole(row.mask, row.valid)
    together_NT = seen_BTT[rows_N, columns_N] | seen_BTT[rows_N, :, columns_N]
    own_NT = row.turns[rows_N] == row.turns[rows_N, columns_N].abs()[:, None]
    return mean_of(row.words[rows_N], (together_NT & own_NT & row.said[rows_N])[:, None])[:, 0]


def fuse(
    config: CompositeConfig,
    row: Row,
    features: Mapping[str, torch.Tensor],
    where: Mapping[str, torch.Tensor],
    parts: Mapping[str, nn.Module],
) -> Run:
    """Returns what the language model runs on.

    Args:
        config: Of the model.
        row: The tokens.
        features: ``(tokens, H)`` by modality.
        where: ``(B, T)`` places of the tokens, by modality.
        parts: The learned parts of fusion by name: ``gate``, ``segments``.
    """
    beside = config.fusion["attention"] in ("cross", "co")
    embeds, state, mask = row.words, row.state, row.mask
    length = row.kinds.shape[1]
    for modality, found in () if beside else features.items():
        embeds = embeds.masked_scatter(where[modality][..., None], found.to(embeds))
    if "segments" in parts:
        embeds = embeds + parts["segments"](row.kinds)
        if state is None:
            kernel = config.text_config._attn_implementation or "sdpa"
            mask = both_ways(mask, row.prompt, row.valid, kernel, embeds.dtype)
    if state is None:
        there = {name for name in config.modalities if "gate" in parts and bool(where[name].any())}
        passes, kinds = plan_passes(config.branches, there), row.kinds
    else:
        passes, kinds = state.passes, state.longer(length).kinds
    present = instruction = log_gate = None
    if "gate" in parts:
        present = present_at(mask, row.kinds, None if state is None else state.present)
        instruction = _instruction(config, replace(row, mask=mask))
        log_gate = parts["gate"](_branches_present(config.branches, present), instruction)
    run_mask = pass_masks(mask, kinds, passes, length)
    stream = _stream(config, replace(row, mask=run_mask), features, where, passes) if beside else None
    kept = FusionState(
        passes,
        kinds,
        None if present is None else present[:, -1],
        None if instruction is None else instruction[:, -1],
        None if stream is None else stream.media,
        state.index if state is not None else _indices(row.kinds, passes) if beside else None,
        None if state is None else state.streams,
    )
    return Run(embeds.repeat_interleave(passes.count, 0), run_mask, mask, passes, log_gate, stream, kept)


def _instruction(config: CompositeConfig, row: Row) -> torch.Tensor | None:
    """Returns ``(B, T, H)`` the embedding of the instruction as far as each token has read it."""
    if not (config.fusion["instruction"] and config.fusion["mode"] != "early"):
        return None
    if row.state is not None:
        assert row.state.instruction is not None
        return row.state.instruction[:, None].expand(-1, row.kinds.shape[1], -1)
    return instruction_so_far(row.words, row.said, row.turns.abs(), row.mask, row.valid)


def _branches_present(branches: tuple[str, ...], present_BTC: torch.Tensor) -> torch.Tensor:
    columns = [
        torch.ones_like(present_BTC[..., 0]) if branch == "joint" else present_BTC[..., MODALITIES.index(branch)]
        for branch in branches
    ]
    return torch.stack(columns, dim=-1)


def _indices(kinds_BT: torch.Tensor, passes: Passes) -> torch.Tensor:
    return places(kinds_BT != TEXT).repeat_interleave(passes.count, 0)


def _stream(
    config: CompositeConfig,
    row: Row,
    features: Mapping[str, torch.Tensor],
    where: Mapping[str, torch.Tensor],
    passes: Passes,
) -> MediaStream:
    """Returns the media beside the sequence; the row's mask is that of all passes."""
    state, length = row.state, row.kinds.shape[1]
    if state is not None:
        assert state.media is not None and state.index is not None
        past = state.kinds.shape[1]
        text_sees = sees(row.mask, state.index, length, past)
        return MediaStream(state.media, text_sees, None, dict(state.streams or {}), fixed=True)
    spread = torch.zeros_like(row.words)
    for modality, found in features.items():
        spread = spread.masked_scatter(where[modality][..., None], found.to(spread))
    index = places(row.kinds != TEXT)
    media = spread.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, spread.shape[-1]))
    media, index = media.repeat_interleave(passes.count, 0), _indices(row.kinds, passes)
    stream = MediaStream(media, sees(row.mask, index, length, 0))
    if config.fusion["attention"] == "co":
        stream.media_sees = _prompt_of_media(row, index, passes.count)
    return stream


def _prompt_of_media(row: Row, index_RM: torch.Tensor, count: int) -> torch.Tensor:
    """Returns ``(B * P, M, T)`` the prompt's words that each media token meets: those of its conversation."""
    asked = (row.prompt & (row.kinds == TEXT)).repeat_interleave(count, 0)
    valid = row.valid if row.valid.shape[0] == index_RM.shape[0] else row.valid.repeat_interleave(count, 0)
    seen_RTT = whole(row.mask, valid)
    at = index_RM.clamp(min=0)[..., None].expand(-1, -1, asked.shape[1])
    together = seen_RTT.gather(1, at) | seen_RTT.transpose(1, 2).gather(1, at)
    return together & asked[:, None] & (index_RM >= 0)[..., None]
