"""What tokens see of each other and of media, from any form of attention mask.

A mask is None, padding ``(B, K)`` with 1 at tokens that are there, a prepared ``(B, 1, Q, K)`` (bool, or additive for
eager attention), or a dict of these by layer type. Queries are the last of the keys.
Shapes: B rows, Q queries, K keys, M media tokens, H width.
"""

from __future__ import annotations

from typing import Any

import torch

from mmtune.errors import CapabilityError


def hide(mask: Any, hidden_BK: torch.Tensor, queries: int) -> Any:
    """Returns the mask under which nobody sees some tokens, which see themselves alone.

    Args:
        mask: Any form.
        hidden_BK: True at the tokens to hide.
        queries: Q.
    """
    if isinstance(mask, dict):
        return {kind: hide(own, hidden_BK, queries) for kind, own in mask.items()}
    if mask is None:
        return (~hidden_BK).long()
    prepared = not is_padding(mask)
    # Virtual tokens may stand before all others.
    hidden = torch.nn.functional.pad(hidden_BK, (mask.shape[-1] - hidden_BK.shape[1], 0))
    if not prepared:
        return mask * ~hidden
    # A softmax over nothing is NaN in some kernels.
    itself = torch.eye(queries, dtype=torch.bool, device=mask.device)
    itself = torch.nn.functional.pad(itself, (mask.shape[-1] - queries, 0))
    gone = hidden[:, None, None, :] & ~itself
    return mask & ~gone if mask.dtype == torch.bool else mask.masked_fill(gone, torch.finfo(mask.dtype).min)


def is_padding(mask: Any) -> bool:
    """Says whether a mask tells of padding alone, so that attention is causal.

    Raises:
        CapabilityError: It is FlexAttention's, which cannot be read.
    """
    if mask is not None and not torch.is_tensor(mask):
        raise CapabilityError(
            "this fusion cannot read FlexAttention's masks", "set model.attn: sdpa", "fusion_needs_dense_mask"
        )
    return mask is None or mask.dim() == 2


def sees(mask: Any, index_BM: torch.Tensor, queries: int, past: int) -> torch.Tensor:
    """Returns bool ``(B, Q, M)``: which of some tokens each query sees.

    Args:
        mask: Any form; of a dict, the layers without a window count.
        index_BM: Places of the tokens among all keys that are no virtual ones; -1 for none.
        queries: Q.
        past: Tokens before the first query.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    real_B1M = (index_BM >= 0)[:, None]
    at_BM = index_BM.clamp(min=0)
    if is_padding(mask):
        asking = torch.arange(past, past + queries, device=index_BM.device)
        seen = at_BM[:, None] <= asking[:, None]
        if mask is None:
            return seen & real_B1M
        there = mask.gather(1, at_BM + (mask.shape[1] - past - queries))
        return seen & real_B1M & there[:, None].bool()
    virtual = mask.shape[-1] - past - queries
    columns = mask[:, 0].gather(2, (at_BM + virtual)[:, None].expand(-1, queries, -1))
    return as_bool(columns) & real_B1M


def seen_so_far(mask: Any, marked_BK: torch.Tensor, queries: int) -> torch.Tensor:
    """Returns ``(B, Q)`` how many of the marked tokens each query sees.

    Args:
        mask: Any form.
        marked_BK: True at the tokens to count, which are no virtual ones.
        queries: Q.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    keys = marked_BK.shape[1]
    if is_padding(mask):
        there_BK = marked_BK if mask is None else marked_BK & mask[:, -keys:].bool()
        return there_BK.long().cumsum(1)[:, -queries:]
    return (as_bool(mask[:, 0, :, -keys:]) & marked_BK[:, None]).sum(-1)


def as_bool(mask: torch.Tensor) -> torch.Tensor:
    """Returns a prepared mask as bool, True where a key is seen."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def whole(mask: Any, valid_BT: torch.Tensor) -> torch.Tensor:
    """Returns the bool mask ``(B, T, T)`` of rows without a past: causal where the mask tells of padding alone."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if not is_padding(mask):
        return as_bool(mask[:, 0, :, -mask.shape[2] :])
    # What stands before is virtual and bears no words.
    rows, length = valid_BT.shape
    causal = torch.ones(length, length, dtype=torch.bool, device=valid_BT.device).tril()
    return causal.expand(rows, -1, -1) & valid_BT[:, None]


def both_ways(mask: Any, prompt_BT: torch.Tensor, valid_BT: torch.Tensor, kernel: str, dtype: torch.dtype) -> Any:
    """Returns the mask under which the tokens of a prompt see each other in both directions (MMBT).

    Tokens that do not see each other in either direction, such as those of two conversations in one row, still do not.

    Args:
        mask: Padding or a prepared mask.
        prompt_BT: True at media and text before the first answer.
        valid_BT: False at padding.
        kernel: The attention's name, which decides the form.
        dtype: Of the hidden states.

    Raises:
        CapabilityError: The kernel takes no such mask.
    """
    if kernel not in ("sdpa", "eager"):
        raise CapabilityError(
            f"the attention kernel {kernel} takes no mask that sees both ways",
            "set model.attn: sdpa",
            "fusion_needs_dense_mask",
        )
    seen = whole(mask, valid_BT)
    within = prompt_BT & valid_BT
    seen = seen | (seen.transpose(1, 2) & within[:, :, None] & within[:, None, :])
    if not is_padding(mask) and mask.shape[-1] > mask.shape[2]:
        seen = torch.cat((as_bool(mask[:, 0, :, : -mask.shape[2]]), seen), dim=2)
    if kernel == "sdpa":
        return seen[:, None]
    return torch.zeros((), dtype=dtype, device=seen.device).where(seen, torch.finfo(dtype).min)[:, None]


def instruction_so_far(
    words_BTH: torch.Tensor, said_BT: torch.Tensor, turns_BT: torch.Tensor, mask: Any, valid_BT: torch.Tensor
) -> torch.Tensor:
    """Returns ``(B, T, H)``: of each token, the mean of what its turn's user has said so far; zero before the first.

    Args:
        words_BTH: Embeddings of the tokens.
        said_BT: Which of them are words of a user.
        turns_BT: The turn of every token, 0 before the first.
        mask: Any form, without a past.
        valid_BT: False at padding.
    """
    seen_BTT = whole(mask, valid_BT) & said_BT[:, None] & (turns_BT[:, :, None] == turns_BT[:, None])
    return mean_of(words_BTH, seen_BTT)


def mean_of(values_BTH: torch.Tensor, counted_BQT: torch.Tensor) -> torch.Tensor:
    """Returns ``(B, Q, H)`` the mean of the values that count for each query; zero where none does."""
    total_BQH = counted_BQT.to(values_BTH.dtype) @ values_BTH
    return total_BQH / counted_BQT.sum(-1).clamp(min=1)[..., None]
