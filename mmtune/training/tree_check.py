"""The check before training: packed trees give the loss and the gradients of separate rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmtune.encoding.render import EncodedRow
from mmtune.encoding.tree import Tree, tree_rows
from mmtune.errors import CapabilityError
from mmtune.models.attention import attention_by, text_attention
from mmtune.models.mask_rules import MaskRules, mask_rules
from mmtune.training.loss import answer_loss
from mmtune.training.packing import TreeLengths
from mmtune.training.sharding import gradient_norm
from mmtune.training.tree_batch import TreeCollator

Batch = Mapping[str, torch.Tensor]
# In fp32 the difference is about 1e-6. Coarser types are measured against themselves: what the
# rows differ by when they are padded together instead of one at a time, several times over; but a model
# whose rows differ much by their padding proves nothing.
_TOLERANCE = 1e-4
_TIMES_NOISE = 4.0
_MOST_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class TreeCheck:
    """What came of it.

    Attributes:
        exact: Trees may be trained as trees.
        loss_error: Relative difference of the loss.
        gradient_error: Norm of the gradients' difference, relative to the gradient.
        tolerance: What was allowed.
        reason: Why not, in words; empty when exact.
    """

    exact: bool
    loss_error: float
    gradient_error: float
    tolerance: float
    reason: str = ""


def trees_to_check(lengths: TreeLengths, modalities: np.ndarray) -> list[np.ndarray]:
    """Returns, per set of modalities, a short and a long tree (or the only one) among those that share, if any do.

    Args:
        lengths: Of the trees.
        modalities: ``(n,)`` a number for the set of modalities of each tree.
    """
    shares = lengths.rows > 1 if (lengths.rows > 1).any() else lengths.rows > 0
    chosen = []
    for kinds in np.unique(modalities[shares]):
        own = np.flatnonzero(shares & (modalities == kinds))
        by_size = own[np.argsort(lengths.tokens[own], kind="stable")]
        chosen.append(np.unique(by_size[[by_size.size // 4, 3 * by_size.size // 4]]))
    return chosen


def check_trees(
    model: Any,
    trees: Sequence[Tree],
    collate: TreeCollator,
    *,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    rows_by: str | None = None,
    batch_tokens: int | None = None,
) -> TreeCheck:
    """Compares packed trees with their separate rows; leaves the model as it was.

    Args:
        model: The model to train, before a distributed wrapper; its gradients must be empty.
        trees: A few real trees.
        collate: As in training.
        device: Where the model is.
        autocast: As in training.
        rows_by: The attention kernel that runs the separate rows; None is the model's own.
        batch_tokens: Most padded tokens at once, as in training; None for one batch of each kind.
    """

    def moved(batch: Batch) -> Batch:
        return {name: value.to(device) for name, value in batch.items()}

    try:
        way = _Way(mask_rules(model), rows_by or text_attention(model), autocast)
        rows = [row for tree in trees for row in tree_rows(tree)]
        together = [moved(collate.collate(part)) for part in _parts(rows, batch_tokens)]
        fits = batch_tokens is None or sum(tree.input_ids.size for tree in trees) <= batch_tokens
        packed = [moved(collate([part])) for part in ([trees] if fits else [[tree] for tree in trees])]
        alone = (moved(collate.collate([row])) for row in rows)
        training = model.training
        # Without dropout, both must agree.
        model.eval()
        try:
            return _compare(model, together, packed, alone, way)
        finally:
            model.zero_grad(set_to_none=True)
            model.train(training)
    except CapabilityError as error:
        return TreeCheck(False, float("nan"), float("nan"), 0.0, str(error))
    except torch.OutOfMemoryError:
        return TreeCheck(False, float("nan"), float("nan"), 0.0, "not enough memory to compare trees with rows")
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        # A model that does not take a prepared mask may fail in any of these ways.
        first = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return TreeCheck(False, float("nan"), float("nan"), 0.0, f"the model refuses packed trees ({first})")


def _parts(rows: Sequence[EncodedRow], batch_tokens: int | None) -> list[list[EncodedRow]]:
    """Returns rows in order, as many together as fit padded."""
    parts: list[list[EncodedRow]] = []
    for row in rows:
        own = [*parts[-1], row] if parts else [row]
        if parts and (batch_tokens is None or len(own) * max(item.input_ids.size for item in own) <= batch_tokens):
            parts[-1] = own
        else:
            parts.append([row])
    return parts


@dataclass(frozen=True)
class _Way:
    """How a batch runs: the rules of trees, the kernel of rows, and the type."""

    rules: MaskRules
    rows_by: str
    autocast: Callable[[], AbstractContextManager[Any]]


def _compare(
    model: Any, together: Sequence[Batch], packed: Iterable[Batch], alone: Iterable[Batch], way: _Way
) -> TreeCheck:
    loss_error, gradient_error = _difference(model, together, packed, way)
    tolerance = _TOLERANCE
    if not _within(loss_error, gradient_error, tolerance):
        noise = _difference(model, together, alone, way)
        tolerance = min(max(tolerance, *(_TIMES_NOISE * value for value in noise)), _MOST_TOLERANCE)
    exact = _within(loss_error, gradient_error, tolerance)
    reason = "" if exact else f"loss differs by {loss_error:.1e}, gradients by {gradient_error:.1e}, of 1"
    return TreeCheck(exact, loss_error, gradient_error, tolerance, reason)


def _within(loss_error: float, gradient_error: float, tolerance: float) -> bool:
    # Each by itself: the larger of a number and NaN may be the number.
    return loss_error <= tolerance and gradient_error <= tolerance


def _difference(model: Any, one: Iterable[Batch], other: Iterable[Batch], way: _Way) -> tuple[float, float]:
    """Returns the relative differences of loss and gradient between two forms of the same rows.

    The second gradient is subtracted from the first where it stands, so one copy is enough.
    """
    model.zero_grad(set_to_none=True)
    first = _backward(model, one, way, 1.0)
    norm = gradient_norm(model.parameters(), None)
    second = _backward(model, other, way, -1.0)
    return abs(second - first) / max(abs(first), 1e-12), gradient_norm(model.parameters(), None) / max(norm, 1e-12)


def _backward(model: Any, batches: Iterable[Batch], way: _Way, sign: float) -> float:
    total = 0.0
    for batch in batches:
        with attention_by(model, text_attention(model) if "layout" in batch else way.rows_by):
            with way.autocast():
                loss, _ = answer_loss(model, batch, way.rules)
            (sign * loss).backward()
        total += float(loss.detach())
    return total
