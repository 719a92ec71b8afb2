"""How often the language model runs over a batch, and what each run may see.

The joint branch sees all modalities, a modality's branch sees it and the text. Branches that would see the same in
this batch share one pass. Rows of a pass stand next to each other: row ``b``'s pass ``p`` is row ``b * P + p``.

Shapes: B rows, T tokens, P passes, K branches, C modalities, H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mmtune.models.composite.config import MODALITIES
from mmtune.models.composite.masks import hide, is_padding, seen_so_far, sees
from mmtune.models.fusion.gate import modality_dropout

TEXT = 0
"""The kind of a token that stands for no medium; others are 1 + their place in ``MODALITIES``."""


def kind_of(modality: str) -> int:
    """Returns the kind of a modality's tokens."""
    return 1 + MODALITIES.index(modality)


@dataclass(frozen=True)
class Passes:
    """The passes of a batch.

    Attributes:
        hidden: Per pass, the kinds of token that nobody sees.
        of_branch: Per branch, its pass.
    """

    hidden: tuple[tuple[int, ...], ...]
    of_branch: tuple[int, ...]

    @property
    def count(self) -> int:
        """P."""
        return len(self.hidden)


def plan_passes(branches: Sequence[str], present: set[str]) -> Passes:
    """Returns as few passes as tell all branches apart.

    Args:
        branches: ``joint`` and modalities.
        present: Modalities that stand in the batch.
    """
    wanted = [
        tuple(sorted(kind_of(other) for other in present if branch not in ("joint", other))) for branch in branches
    ]
    distinct = tuple(dict.fromkeys(wanted))
    return Passes(distinct, tuple(distinct.index(own) for own in wanted))


@dataclass(frozen=True)
class FusionState:
    """What later tokens need of those before them, beside keys and values.

    Attributes:
        passes: Of the prompt.
        kinds: ``(B, past)`` kinds of the tokens so far.
        present: ``(B, C)`` modalities that the last token sees, where there is a gate.
        instruction: ``(B, H)`` embedding of the instruction, where something is conditioned by it.
        media: ``(B * P, M, H)`` media beside the sequence, where attention is cross or co.
        index: ``(B * P, M)`` their places.
        streams: Per layer of co-attention, the media stream that came into it.
    """

    passes: Passes
    kinds: torch.Tensor
    present: torch.Tensor | None = None
    instruction: torch.Tensor | None = None
    media: torch.Tensor | None = None
    index: torch.Tensor | None = None
    streams: dict[int, torch.Tensor] | None = None

    def longer(self, tokens: int) -> FusionState:
        """Returns the state after some more tokens of text."""
        return replace(self, kinds=torch.nn.functional.pad(self.kinds, (0, tokens), value=TEXT))


def hidden_kinds(kinds_BK: torch.Tensor, kinds: Sequence[int]) -> torch.Tensor:
    """Returns ``(B, K)`` where tokens of some kinds stand."""
    return torch.isin(kinds_BK, torch.tensor(list(kinds), dtype=kinds_BK.dtype, device=kinds_BK.device))


def pass_masks(mask: Any, kinds_BK: torch.Tensor, passes: Passes, queries: int) -> Any:
    """Returns the mask of all passes, ``B * P`` rows.

    Args:
        mask: Any form, of B rows.
        kinds_BK: Of all tokens so far.
        passes: Of the batch.
        queries: Tokens that ask.
    """
    if passes.count == 1 and not passes.hidden[0]:
        return mask
    if isinstance(mask, dict):
        return {kind: pass_masks(own, kinds_BK, passes, queries) for kind, own in mask.items()}
    parts = [hide(mask, hidden_kinds(kinds_BK, own), queries) for own in passes.hidden]
    return torch.stack(parts, dim=1).flatten(0, 1)


def pass_positions(
    positions_BT: torch.Tensor | None, mask: Any, kinds_BK: torch.Tensor, passes: Passes, queries: int, past: Any
) -> torch.Tensor | None:
    """Returns ``(B * P, T)`` positions along what each pass sees; None where every pass sees all, and none were given.

    A medium that is hidden from a pass takes no place in it: where the words behind it stand would tell its length.

    Args:
        positions_BT: Along all that the rows hold; None counts on from the cache.
        mask: Any form, of B rows, nothing hidden from a pass.
        kinds_BK: Of all tokens so far.
        passes: Of the batch.
        queries: T, the tokens that ask.
        past: The cache of the call, or None.
    """
    if not any(passes.hidden):
        return positions_BT
    if positions_BT is None:
        first = 0 if past is None else past.get_seq_length()
        positions_BT = torch.arange(first, first + queries, device=kinds_BK.device)[None]
    found = []
    for own in passes.hidden:
        missed = seen_so_far(mask, hidden_kinds(kinds_BK, own), queries) if own else 0
        found.append(positions_BT.expand(len(kinds_BK), -1) - missed)
    return torch.stack(found, dim=1).flatten(0, 1)


def dropped(kinds_BT: torch.Tensor, positions_BT: torch.Tensor | None, rate: float, kinds: int) -> torch.Tensor:
    """Returns ``(B, T)`` the media tokens that modality dropout hides, drawn from torch's own seed.

    A conversation loses whole modalities and never the last one it has; those packed into one row draw apart.

    Args:
        kinds_BT: Kinds of the tokens.
        positions_BT: Positions, which start again at every conversation; None for one a row.
        rate: Chance of each modality to go.
        kinds: How many there are, see ``CompositeConfig.kinds``.
    """
    talk_BT = torch.zeros_like(kinds_BT, dtype=torch.long)
    if positions_BT is not None:
        talk_BT = ((positions_BT == 0) & (torch.arange(kinds_BT.shape[1], device=kinds_BT.device) > 0)).long().cumsum(1)
    talks = int(talk_BT.max()) + 1
    slot_BT = talk_BT * kinds + kinds_BT.long()
    present = torch.zeros(len(kinds_BT), talks * kinds, dtype=torch.bool, device=kinds_BT.device)
    present = present.scatter(1, slot_BT, True).view(-1, kinds)
    present[:, TEXT] = False
    kept = modality_dropout(present, rate, torch.default_generator)
    gone = (present & ~kept).view(len(kinds_BT), talks * kinds)
    return gone.gather(1, slot_BT)


def present_at(mask: Any, kinds_BT: torch.Tensor, before_BC: torch.Tensor | None) -> torch.Tensor:
    """Returns bool ``(B, T, C)``: the modalities that each token sees.

    Args:
        mask: Any form, over tokens of these kinds alone or over earlier ones too.
        kinds_BT: Kinds of the tokens that ask.
        before_BC: What the token before them saw, or None.
    """
    length = kinds_BT.shape[1]
    if before_BC is not None:
        return before_BC[:, None].expand(-1, length, -1)
    found = []
    for modality in MODALITIES:
        own_BT = kinds_BT == kind_of(modality)
        if not isinstance(mask, dict) and is_padding(mask):
            own_BT = own_BT if mask is None else own_BT & mask[:, -length:].bool()
            found.append(own_BT.long().cumsum(1) > 0)
        else:
            found.append(sees(mask, places(own_BT), length, 0).any(-1))
    return torch.stack(found, dim=-1)


def places(marked_BT: torch.Tensor) -> torch.Tensor:
    """Returns ``(B, M)`` the places of marked tokens, in order, -1 behind the last; M is at least 1."""
    most = max(int(marked_BT.sum(1).max()), 1)
    order = torch.argsort((~marked_BT).byte(), dim=1, stable=True)[:, :most]
    return order.masked_fill(~marked_BT.gather(1, order), -1)
