"""SDPA of packed trees in pieces, on a CPU: products that a mask hides as a whole are not made.

A dense mask costs T x T products per head, of which trees need a part: nobody sees another tree, a prefix
sees no branch, and a branch no sibling. The pieces stand with the mask, so whatever hands the mask on (adapters,
checkpointed blocks, wrappers) hands them on too; where they get lost, attention is that of the whole mask.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mmtune.models.strips import Span, Strip, attend, spans_of

_PIECES = "mmtune_pieces"
_STRIP = 128
"""Most queries of a causal piece that are asked at once: each strip saves the products with the keys behind it."""
_KEPT_BYTES = 8 << 20
"""Most bytes of probabilities that a layer keeps of a row for the backward pass; beyond, a flash kernel keeps none."""


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


@dataclass(frozen=True)
class _Row:
    """The pieces of a row with its mask, which is cut once for all layers."""

    mask_11TT: torch.Tensor
    pieces: Sequence[Piece]
    causal: bool

    @cached_property
    def masks(self) -> list[torch.Tensor | None]:
        """Of every piece; None where it is causal."""
        return [
            None
            if self.causal and piece.causal
            else spans_of(self.mask_11TT[:, :, slice(*piece.queries)], piece.keys, 3)
            for piece in self.pieces
        ]

    @cached_property
    def strips(self) -> tuple[Strip, ...]:
        """The row as it is multiplied out."""
        found = [strip for piece in self.pieces for strip in _strips(piece)]
        mask_TT = self.mask_11TT[0, 0]
        return tuple(Strip(queries, keys, spans_of(mask_TT[slice(*queries)], keys, 1)) for queries, keys in found)

    @cached_property
    def products(self) -> int:
        """Pairs of a query and a key that the strips multiply."""
        return sum(strip.mask_QK.numel() for strip in self.strips)

    def is_short(self, heads: int) -> bool:
        """Whether the probabilities of so many heads are few enough to be kept."""
        return self.products * heads * self.mask_11TT.element_size() <= _KEPT_BYTES


def with_pieces(mask_B1TT: torch.Tensor, pieces: Sequence[Sequence[Piece]], *, causal: bool) -> torch.Tensor:
    """Returns the mask as one that SDPA takes piece by piece.

    Args:
        mask_B1TT: Additive, of whole rows.
        pieces: Of every row, in order, their queries together the whole row.
        causal: Whether what a piece calls causal is, which no sliding window is.
    """
    AttentionInterface.register("sdpa", _attention)
    whole = mask_B1TT.view_as(mask_B1TT)
    setattr(whole, _PIECES, [_Row(*row, causal) for row in zip(mask_B1TT.split(1), pieces, strict=True)])
    return whole


def without_pieces(mask: Any) -> Any:
    """Returns the mask as one that SDPA takes whole."""
    return mask.view_as(mask) if hasattr(mask, _PIECES) else mask


def strips_of(mask: Any, heads: int, dtype: torch.dtype) -> list[Sequence[Strip]] | None:
    """Returns the strips of every row where all rows are multiplied out in strips; else None.

    Args:
        mask: What a layer is given as ``attention_mask``.
        heads: That ask.
        dtype: Of queries, keys and values.
    """
    cut: list[_Row] | None = getattr(mask, _PIECES, None)
    if cut is None or mask.dtype != dtype or not all(row.is_short(heads) for row in cut):
        return None
    return [row.strips for row in cut]


def _strips(piece: Piece) -> Iterator[tuple[Span, tuple[Span, ...]]]:
    """Gives the queries and keys of a piece, of a causal one in strips of about the same size."""
    first, end = piece.queries
    count = -(-(end - first) // _STRIP) if piece.causal else 1
    for number in range(count):
        queries = (first + (end - first) * number // count, first + (end - first) * (number + 1) // count)
        # Also within a sliding window nobody sees what comes later.
        yield queries, ((first, queries[1]),) if piece.causal else piece.keys


def _attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
    """Transformers' SDPA, in pieces where the mask brings them; ``(B, T, heads, width)`` and no weights."""
    cut = getattr(attention_mask, _PIECES, None)
    if cut is None or len(cut) != len(query) or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    made_rows = []
    # Taken apart at once: the gradients of rows and of pieces are laid side by side, not added up.
    for q, k, v, row in zip(*((x,) if len(cut) == 1 else x.split(1) for x in (query, key, value)), cut, strict=True):
        if _is_multiplied(q, row, options):
            scaling = options.get("scaling")
            scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
            made_rows.append(attend(q[0], k[0], v[0], row.strips, scaling)[None])
            continue
        asked = q.split([piece.queries[1] - piece.queries[0] for piece in row.pieces], dim=2)
        parts = zip(asked, row.pieces, row.masks, strict=True)
        made = [_of_piece(module, few, k, v, piece, mask, options) for few, piece, mask in parts]
        made_rows.append(made[0] if len(made) == 1 else torch.cat(made, dim=1))
    return made_rows[0] if len(made_rows) == 1 else torch.cat(made_rows), None


def _is_multiplied(query_1HTD: torch.Tensor, row: _Row, options: dict[str, Any]) -> bool:
    """Whether the probabilities of a row are few enough to be kept, and nothing asks more than attention's formula."""
    plain = not options.get("dropout") and options.get("cache") is None and options.get("softcap") is None
    return plain and query_1HTD.dtype == row.mask_11TT.dtype and row.is_short(query_1HTD.shape[1])


def _of_piece(module: Any, asked: Any, key: Any, value: Any, piece: Piece, mask: Any, options: dict[str, Any]) -> Any:
    own = {**options, "is_causal": mask is None}
    key, value = (spans_of(values, piece.keys, 2) for values in (key, value))
    return sdpa_attention_forward(module, asked, key, value, mask, **own)[0]
