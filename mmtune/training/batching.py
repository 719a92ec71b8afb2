"""How a split becomes batches: its trees packed as they are, or every row apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from mmtune.errors import CapabilityError
from mmtune.models.attention import FLEX
from mmtune.models.fused_parts import fused_parts
from mmtune.models.mask_rules import MaskRules, mask_rules
from mmtune.models.rope_index import rope_index
from mmtune.training.data import PackedBatches, RowBatches, Trees, row_sizes, tree_sizes
from mmtune.training.loss import answer_loss
from mmtune.training.packing import Packing, TreeLengths, tree_costs, tree_lengths, tree_modalities
from mmtune.training.plan import Plan, row_batches
from mmtune.training.tree_batch import TreeCollator
from mmtune.training.tree_blocks import BLOCK
from mmtune.training.tree_check import TreeCheck, check_trees, trees_to_check

if TYPE_CHECKING:
    import pyarrow as pa

    from mmtune.encoding.collate import Collator
    from mmtune.features.shards import Features


@dataclass(frozen=True)
class Split:
    """A split of tokens/ that is ready to be batched.

    Attributes:
        table: Its rows.
        collate: Rows to a padded batch.
    """

    table: pa.Table
    collate: Collator

    def with_features(self, kind: str, features: Features) -> Split:
        """Returns the split with features in place of every ``image`` or ``audio``."""
        return Split(self.table, self.collate.with_features(kind, features))

    def with_pixels(self, pixels: Features) -> Split:
        """Returns the split with processed images from disk, where they stand there."""
        return Split(self.table, self.collate.with_pixels(pixels))

    @cached_property
    def trees(self) -> Trees:
        """Its trees."""
        return Trees(self.table)

    @cached_property
    def lengths(self) -> TreeLengths:
        """The lengths of its trees."""
        return tree_lengths(self.table)

    @property
    def shares(self) -> bool:
        """Whether some tree has more than one row."""
        return bool(self.lengths.rows.max(initial=0) > 1)


class Batches(Protocol):
    """What makes the batches; a unit is a row or a tree, by its number.

    ``batch`` takes units and the training step (None: images as they are), ``ids`` gives the
    example ids of some units, ``modalities`` the kinds of media in them.
    """

    def batch(self, units: Any, step: int | None = None) -> dict[str, Any]: ...  # noqa: D102

    def ids(self, units: Any) -> list[str]: ...  # noqa: D102

    def modalities(self, units: Any) -> set[str]: ...  # noqa: D102


@dataclass(frozen=True)
class WithColumns:
    """Batches with columns beside those that the model reads.

    Attributes:
        batches: Units to batches.
        columns: ``(units, step)``, as ``batch`` takes them, to the columns; picklable for loader processes.
    """

    batches: Batches
    columns: Callable[[Any, int | None], dict[str, torch.Tensor]]

    def batch(self, units: Any, step: int | None = None) -> dict[str, Any]:
        """Returns the batch of some units, as it is at a training step."""
        return {**self.batches.batch(units, step), **self.columns(units, step)}

    def ids(self, units: Any) -> list[str]:
        """Returns the example ids of some units."""
        return self.batches.ids(units)

    def modalities(self, units: Any) -> set[str]:
        """Returns the kinds of media in some units."""
        return self.batches.modalities(units)


def step_column(units: Any, step: int | None) -> dict[str, torch.Tensor]:
    """Returns ``step``, the training step that a batch is made for; -1 outside training."""
    return {"step": torch.tensor(-1 if step is None else step)}


@dataclass(frozen=True)
class Batching:
    """One way to make batches of a split and to take their loss.

    Attributes:
        plan: Which units make which step.
        batches: Units to batches.
        loss: ``(model, batch)`` to the summed loss and the number of labels.
        tokens: Tokens of an epoch, and what they would be if every row stood apart.
        rules: The model's attention, where trees are packed.
    """

    plan: Plan
    batches: Batches
    loss: Callable[[Any, Mapping[str, torch.Tensor]], tuple[torch.Tensor, int]]
    tokens: tuple[int, int]
    rules: MaskRules | None = None

    @property
    def label_share(self) -> float:
        """Share of an epoch's tokens that bear loss."""
        return float(self.plan.sizes.targets.sum()) / max(self.tokens[0], 1)


def check_sharing(model: Any, split: Split, accelerator: Any, rows_by: str, batch_tokens: int | None) -> TreeCheck:
    """Compares a few real trees of every set of modalities with their separate rows, see ``check_trees``.

    Returns the worst of it. ``rows_by`` is the attention kernel of the rows, ``batch_tokens`` the limit of a batch.
    """
    if getattr(model.config, "media_read_prompt", False):
        # A gate that has hardly opened would hide it from the check, and opens as it trains.
        return TreeCheck(False, float("nan"), float("nan"), 0.0, "its media read the question")
    try:
        collate = _tree_collator(model, split, mask_rules(model))
    except CapabilityError as error:
        return TreeCheck(False, float("nan"), float("nan"), 0.0, str(error))
    worst = TreeCheck(True, 0.0, 0.0, 0.0)
    with fused_parts(model):
        for numbers in trees_to_check(split.lengths, tree_modalities(split.table)):
            found = check_trees(
                model,
                split.trees.trees(numbers),
                collate,
                device=accelerator.device,
                autocast=accelerator.autocast,
                rows_by=rows_by,
                batch_tokens=batch_tokens,
            )
            if not found.exact:
                return found
            worst = max(worst, found, key=lambda check: check.gradient_error)
    return worst


def rows_apart(split: Split, course: Mapping[str, Any]) -> Batching:
    """Returns batches of separate rows, the same whether tokens/ has rows or trees.

    Args:
        split: The split.
        course: The arguments of ``Plan`` but ``sizes`` and ``packed``; ``cut`` as limits of a micro batch, or None.
    """
    sizes, at = row_sizes(split.table)
    course = {**course, "cut": course.get("cut") and partial(row_batches, sizes=sizes, **course["cut"])}
    tokens = int(sizes.tokens.sum())
    batches = RowBatches(split.trees, at, split.collate)
    return Batching(Plan(sizes=sizes, **course), batches, answer_loss, (tokens, tokens))


def packed_trees(model: Any, split: Split, course: Mapping[str, Any]) -> Batching:
    """Returns batches of packed trees, in which every shared prefix stands once.

    Under FlexAttention, which skips what the mask hides, a bin is a whole micro batch. Else it is
    as long as the longest tree: a longer one would compute more of the masked part.

    Args:
        model: For its positions and masks.
        split: The split.
        course: As in ``rows_apart``.

    Raises:
        CapabilityError: The model's attention takes no mask of our own.
    """
    rules = mask_rules(model)
    rows: int | None = course["batch_rows"]
    media: int | None = course["batch_media_tokens"]
    capacity = bin_tokens(split.lengths, course["batch_tokens"], rules)
    costs = tree_costs(split.lengths, capacity, media=media, rows=rows)
    packing = Packing(costs, split.lengths, capacity, course["seed"])
    packed: Callable[[int], list[np.ndarray]] = partial(
        packing.epoch_batches, batch_tokens=course["batch_tokens"], batch_rows=rows, batch_media_tokens=media
    )
    batches = PackedBatches(split.trees, packing, _tree_collator(model, split, rules))
    course = {**course, "cut": course.get("cut") and partial(packing.cut, **course["cut"])}
    plan = Plan(sizes=tree_sizes(split.table), packed=packed, **course)
    tokens = int(split.lengths.tokens.sum()), int(row_sizes(split.table)[0].tokens.sum())
    return Batching(plan, batches, partial(answer_loss, rules=rules), tokens, rules)


def bin_tokens(lengths: TreeLengths, batch_tokens: int, rules: MaskRules) -> int:
    """Returns how many tokens a bin may hold; see ``packed_trees``."""
    if rules.implementation == FLEX:
        return max(batch_tokens // BLOCK, 1) * BLOCK
    return int(lengths.tokens.max())


def _tree_collator(model: Any, split: Split, rules: MaskRules) -> TreeCollator:
    flex = rules.implementation == FLEX
    windows = tuple(rules.windows.values()) if flex else ()
    return TreeCollator(split.collate, rope_index(model), BLOCK if flex else 1, windows)
