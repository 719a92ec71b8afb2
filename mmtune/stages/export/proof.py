"""The proof that an exported model is the tuned one: what both lose by the answer tokens of some rows of tokens/.

Shapes: B rows, T tokens, N answer tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtune.encoding.collate import Collator
from mmtune.errors import DataError, IntegrityError
from mmtune.media.paths import MediaRefused, open_medium
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


@dataclass(frozen=True)
class ProofRows:
    """The rows of tokens/ that a proof reads; their padded batches are made one after the other, at every reading.

    Attributes:
        batches: Row numbers to batches.
        count: How many rows are read, the first ones.
        media_root: Folder that media paths are relative to.
    """

    batches: RowBatches
    count: int
    media_root: Path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for numbers in self._numbers():
            with self._reading(int(numbers[0])):
                batch = self.batches.batch(numbers)
            yield batch

    def check_media(self) -> None:
        """Opens every medium and decodes none.

        Raises:
            DataError: One is gone, or no file below the media root.
        """
        for numbers in self._numbers():
            for number, row in zip(numbers, self.batches.encoded(numbers), strict=True):
                for span in row.media:
                    with self._reading(int(number)):
                        open_medium(self.media_root, span.medium)[0].close()

    def _numbers(self) -> Iterator[np.ndarray]:
        for first in range(0, self.count, _BATCH_ROWS):
            yield np.arange(first, min(first + _BATCH_ROWS, self.count))

    @contextmanager
    def _reading(self, first: int) -> Iterator[None]:
        """Says what helps export where a medium of the rows from ``first`` on is refused."""
        try:
            yield
        except MediaRefused as error:
            fewer = f", or compare on the {first} rows before it alone: --set export.rows={first}" if first else ""
            raise DataError(
                f"{error.message}; export reads it to compare both models",
                f"put it back below {self.media_root} as it was{fewer}; or compare on other rows: mmtune build-data,"
                " then mmtune tokenize",
                error.code,
            ) from error


def rows_of(folder: Path, split: str, rows: int, processor: Any, media_root: Path) -> ProofRows:
    """Returns the first rows of a split of tokens/.

    Reading them raises DataError where a medium cannot be read, IntegrityError where it now takes another number of
    tokens.

    Args:
        folder: ``tokens/``.
        split: Its split.
        rows: At most this many.
        processor: Of the model.
        media_root: Folder that media paths are relative to.

    Raises:
        IntegrityError: Rows have soft tokens, which no weights know.
    """
    found = Split(open_split(folder / split), Collator(processor, media_root=media_root))
    if soft_token_count(found.table):
        raise IntegrityError(
            "tokens/ has soft tokens, which adapter/ was not tuned on", "run: mmtune finetune --force", "other_tokens"
        )
    _, at = row_sizes(found.table)
    return ProofRows(RowBatches(found.trees, at, found.collate), min(rows, len(at)), media_root)


@torch.no_grad()
def losses_of(model: Any, rows: ProofRows) -> torch.Tensor:
    """Returns ``(N,)`` fp32 on the CPU, what a model loses by every answer token of some rows."""
    device = next(model.parameters()).device
    return torch.cat([_losses(model, batch, device) for batch in rows])


def _losses(model: Any, batch: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    given = {name: value.to(device) for name, value in batch.items()}
    return answer_losses(model, given)[0].float().cpu()


def losses_without_adapters(model: Any, rows: ProofRows) -> torch.Tensor:
    """Returns ``losses_of`` the base of a model with adapters."""
    with model.disable_adapter():
        return losses_of(model, rows)


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
