"""The proof that an exported model is the tuned one: what both lose by the answer tokens of some rows of tokens/.

Shapes: B rows, T tokens, N answer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtune.encoding.collate import Collator
from mmtune.errors import IntegrityError
from mmtune.storage import open_split
from mmtune.training.batching import Split
from mmtune.training.data import RowBatches, row_sizes, soft_token_count
from mmtune.training.loss import answer_losses

_BATCH_ROWS = 8
_LEAST = 1e-3
"""Nats per token that are rounding, whatever tuning changed."""
_MOST_SHARE = 0.05
"""Most of what tuning changed that fewer bits may lose."""


@dataclass(frozen=True)
class Proof:
    """How far an exported model is from the tuned one, in nats per answer token.

    Attributes:
        rows: That were read.
        tokens: Their answer tokens.
        difference: Mean of the absolute difference between both.
        change: The same between the tuned model and its base; None where that was random.
        loss: Mean loss of the tuned model.
    """

    rows: int
    tokens: int
    difference: float
    change: float | None
    loss: float

    @property
    def holds(self) -> bool:
        """Whether the exported model answers as the tuned one does."""
        most = _MOST_SHARE * (self.loss if self.change is None else self.change)
        # Written so that what is no number does not hold.
        return self.difference <= max(most, _LEAST)


def batches_of(folder: Path, split: str, rows: int, processor: Any, media_root: Path) -> tuple[int, list[Any]]:
    """Returns how many rows of a split of tokens/ were taken, the first ones, and their padded batches.

    Args:
        folder: ``tokens/``.
        split: Its split.
        rows: At most this many.
        processor: Of the model.
        media_root: Folder that media paths are relative to.

    Raises:
        DataError: A medium cannot be read.
        IntegrityError: A medium now takes another number of tokens, or rows have soft tokens, which no weights know.
    """
    found = Split(open_split(folder / split), Collator(processor, media_root=media_root))
    if soft_token_count(found.table):
        raise IntegrityError(
            "tokens/ has soft tokens, which adapter/ was not tuned on", "run: mmtune finetune --force", "other_tokens"
        )
    _, at = row_sizes(found.table)
    batches, numbers = RowBatches(found.trees, at, found.collate), np.arange(min(rows, len(at)))
    return len(numbers), [
        batches.batch(some) for some in np.split(numbers, range(_BATCH_ROWS, len(numbers), _BATCH_ROWS))
    ]


@torch.no_grad()
def losses_of(model: Any, batches: list[Any]) -> torch.Tensor:
    """Returns ``(N,)`` fp32 on the CPU, what a model loses by every answer token of some batches."""
    device, found = next(model.parameters()).device, []
    for batch in batches:
        given = {name: value.to(device) for name, value in batch.items()}
        found.append(answer_losses(model, given)[0].float().cpu())
    return torch.cat(found)


def losses_without_adapters(model: Any, batches: list[Any]) -> torch.Tensor:
    """Returns ``losses_of`` the base of a model with adapters."""
    with model.disable_adapter():
        return losses_of(model, batches)


def prove(rows: int, tuned_N: torch.Tensor, base_N: torch.Tensor | None, exported_N: torch.Tensor, dtype: str) -> Proof:
    """Returns how far an exported model is from the tuned one.

    Args:
        rows: That were read.
        tuned_N: From ``losses_of`` the tuned model.
        base_N: Of its base, where that has weights.
        exported_N: Of the exported model, read back.
        dtype: Of its weights, for the advice.

    Raises:
        IntegrityError: It answers otherwise.
    """
    change = None if base_N is None else _apart(tuned_N, base_N)
    found = Proof(rows, len(tuned_N), _apart(tuned_N, exported_N), change, float(tuned_N.mean()))
    if not found.holds:
        beside = f"that loses {found.loss:.2g}" if change is None else f"and tuning changed it by {change:.2g}"
        raise IntegrityError(
            f"in {dtype} the exported model is {found.difference:.2g} nats per answer token off the tuned one,"
            f" {beside}; nothing was written",
            "check the base model, and tune again" if dtype == "fp32" else "set export.dtype: fp32",
            "export_differs",
        )
    return found


def _apart(one_N: torch.Tensor, other_N: torch.Tensor) -> float:
    return float((one_N - other_N).abs().mean())
