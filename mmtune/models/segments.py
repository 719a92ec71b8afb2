"""SDPA of packed trees in pieces, on a CPU: products that a mask hides as a whole are not made.

A dense mask costs T x T products per head, of which trees need a part: nobody sees another tree, a prefix
sees no branch, and a branch no sibling. The pieces stand with the mask, so whatever hands the mask on (adapters,
checkpointed blocks, wrappers) hands them on too; where they get lost, attention is that of the whole mask.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_PIECES = "mmtune_pieces"
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries that stand together, and the keys among which all that they see stands.

    Attributes:
        queries: First and end.
        keys: One span, or the span of a prefix and one behind it.
        causal: Queries and keys are the same tokens, and each sees itself and all before it.
    """

    queries: Span
    keys: tuple[Span, ...]
    causal: bool = False

    @property
    def products(self) -> int:
        """Pairs of a query and a key that are multiplied."""
        queries = self.queries[1] - self.queries[0]
        return queries * (queries + 1) // 2 if self.causal else queries * sum(end - first for first, end in self.keys)


def with_pieces(mask_B1TT: torch.Tensor, pieces: Sequence[Sequence[Piece]], *, causal: bool) -> torch.Tensor:
    """Returns the mask as one that SDPA takes piece by piece.

    Args:
        mask_B1TT: Additive, of whole rows.
        pieces: Of every row, in order, their queries together the whole row.
        causal: Whether what a piece calls causal is, which no sliding window is.
    """
    AttentionInterface.register("sdpa", _attention)
    whole = mask_B1TT.view_as(mask_B1TT)
    # The masks of the pieces are cut once, for all layers.
    cut = [
        [
            (piece, None if causal and piece.causal else _keys_of(mask_11TT[:, :, slice(*piece.queries)], piece, 3))
            for piece in own
        ]
        for mask_11TT, own in zip(mask_B1TT.split(1), pieces, strict=True)
    ]
    setattr(whole, _PIECES, cut)
    return whole


def without_pieces(mask: Any) -> Any:
    """Returns the mask as one that SDPA takes whole."""
    return mask.view_as(mask) if hasattr(mask, _PIECES) else mask


def _keys_of(values: torch.Tensor, piece: Piece, axis: int) -> torch.Tensor:
    """Returns what of an axis of keys belongs to a piece."""
    if piece.keys == ((0, values.shape[axis]),):
        return values  # a slice of all would cost a copy in the backward pass
    parts = [values.narrow(axis, first, end - first) for first, end in piece.keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)


def _attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
    """Transformers' SDPA, in pieces where the mask brings them; ``(B, T, heads, width)`` and no weights."""
    cut = getattr(attention_mask, _PIECES, None)
    if cut is None or len(cut) != len(query) or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows = []
    # Taken apart at once: the gradients of rows and of pieces are laid side by side, not added up.
    for q, k, v, own in zip(*((x,) if len(cut) == 1 else x.split(1) for x in (query, key, value)), cut, strict=True):
        asked = q.split([piece.queries[1] - piece.queries[0] for piece, _ in own], dim=2)
        made = [
            _of_piece(module, few, k, v, piece, mask, options) for few, (piece, mask) in zip(asked, own, strict=True)
        ]
        rows.append(made[0] if len(made) == 1 else torch.cat(made, dim=1))
    return rows[0] if len(rows) == 1 else torch.cat(rows), None


def _of_piece(module: Any, asked: Any, key: Any, value: Any, piece: Piece, mask: Any, options: dict[str, Any]) -> Any:
    own = {**options, "is_causal": mask is None}
    return sdpa_attention_forward(module, asked, _keys_of(key, piece, 2), _keys_of(value, piece, 2), mask, **own)[0]
