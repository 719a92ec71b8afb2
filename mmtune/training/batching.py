"""How a split becomes batches: its trees packed as they are, or every row apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmtune.training.data import PackedBatches, TreeBatches, tree_sizes
from mmtune.training.loss import answer_loss
from mmtune.training.packing import Packing, TreeLengths, tree_costs, tree_lengths
from mmtune.training.plan import Plan, TreeSizes
from mmtune.training.rope_index import rope_index
from mmtune.training.tree_batch import TreeCollator
from mmtune.training.tree_check import TreeCheck, check_trees, trees_to_check
from mmtune.training.tree_mask import mask_rules

if TYPE_CHECKING:
    import pyarrow as pa

    from mmtune.encoding.collate import Collator

# FlexAttention works on blocks of this many tokens.
_FLEX_BLOCK = 128


@dataclass(frozen=True)
class Split:
    """A split of tokens/ that is ready to be batched.

    Attributes:
        source: Its trees.
        collate: Rows to a padded batch.
        sizes: Of its trees, for batches of separate rows.
        lengths: Of its trees, for packing.
    """

    source: TreeBatches
    collate: Collator
    sizes: TreeSizes
    lengths: TreeLengths

    @property
    def shares(self) -> bool:
        """Whether some tree has more than one row."""
        return bool(self.lengths.rows.max(initial=0) > 1)


def load_split(table: pa.Table, collate: Collator) -> Split:
    """Returns a table of tokens/ as a split."""
    return Split(TreeBatches(table, collate), collate, tree_sizes(table), tree_lengths(table))


@dataclass(frozen=True)
class Batching:
    """One way to make batches of a split and to take their loss.

    Attributes:
        plan: Which trees make which step.
        batch: Tree indices and the training step (None: images as they are) to a batch.
        loss: ``(model, batch)`` to the summed loss and the number of labels.
    """

    plan: Plan
    batch: Callable[..., dict[str, Any]]
    loss: Callable[[Any, Mapping[str, torch.Tensor]], tuple[torch.Tensor, int]]


def check_sharing(model: Any, split: Split, accelerator: Any) -> TreeCheck:
    """Compares a few real trees of the split with their separate rows, see ``check_trees``."""
    return check_trees(
        model,
        split.source.trees(trees_to_check(split.lengths)),
        _tree_collator(model, split),
        device=accelerator.device,
        autocast=accelerator.autocast,
    )


def rows_apart(split: Split, course: Mapping[str, Any]) -> Batching:
    """Returns batches of separate rows.

    Args:
        split: The split.
        course: The arguments of ``Plan`` but ``sizes`` and ``packed``.
    """
    return Batching(Plan(sizes=split.sizes, **course), split.source.batch, answer_loss)


def packed_trees(model: Any, split: Split, course: Mapping[str, Any]) -> Batching:
    """Returns batches of packed trees, in which every shared prefix stands once.

    A bin is as long as the longest tree: a longer one would compute more of the masked part of
    the attention.

    Args:
        model: For its positions and masks.
        split: The split.
        course: As in ``rows_apart``.

    Raises:
        CapabilityError: The model's attention takes no mask of our own.
    """
    rules = mask_rules(model)
    rows: int | None = course["batch_rows"]
    capacity = int(split.lengths.tokens.max())
    costs = tree_costs(split.lengths, capacity, rows=rows)
    packing = Packing(costs, split.lengths.rows, capacity, course["seed"])
    packed: Callable[[int], list[np.ndarray]] = partial(
        packing.epoch_batches, batch_tokens=course["batch_tokens"], batch_rows=rows
    )
    batches = PackedBatches(split.source, packing, _tree_collator(model, split))
    return Batching(Plan(sizes=split.sizes, packed=packed, **course), batches.batch, partial(answer_loss, rules=rules))


def _tree_collator(model: Any, split: Split) -> TreeCollator:
    flex = model.config.get_text_config()._attn_implementation == "flex_attention"
    return TreeCollator(split.collate, rope_index(model), multiple_of=_FLEX_BLOCK if flex else 1)
