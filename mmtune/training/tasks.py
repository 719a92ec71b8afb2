"""The answers' loss by parts: the weighted sum over tasks, and what the passes of a fusion lose alone.

Shapes: B rows, T tokens, N label tokens, C conversations (rows, or the branches of packed trees).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mmtune.errors import RecipeError
from mmtune.models.mask_rules import MaskRules
from mmtune.models.objectives.tasks import by_task
from mmtune.training.batching import Batches, Batching, WithColumns
from mmtune.training.ledger import Ledger
from mmtune.training.loss import answer_losses

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Tasks:
    """The tasks of a run.

    Attributes:
        weights: Of every task by its name, in the order of the numbers; empty where there is one and the recipe
            gives it none.
        of_example: Example ids to the numbers.
    """

    weights: Mapping[str, float]
    of_example: Mapping[str, int]

    def told(self, batches: Batches) -> Batches:
        """Returns the batches with ``tasks`` ``(C,)``, the number of every conversation's task in order.

        They stay as they are where nothing is weighed.
        """
        return WithColumns(batches, partial(_task_column, self, batches)) if self.weights else batches


def _task_column(tasks: Tasks, batches: Batches, units: Any, step: int | None) -> dict[str, torch.Tensor]:
    return {"tasks": torch.tensor([tasks.of_example[one] for one in batches.ids(units)])}


def by_id(tables: Iterable[pa.Table], column: str) -> dict[str, str]:
    """Returns what stands in a column of some splits, by the id of the row."""
    found: dict[str, str] = {}
    for table in tables:
        found.update(zip(table["id"].to_pylist(), table[column].to_pylist(), strict=True))
    return found


def tasks_of(tables: Iterable[pa.Table], weights: Mapping[str, float], section: str) -> Tasks:
    """Returns the tasks of some splits.

    Args:
        tables: Splits of instructions/, with ``id`` and ``task``.
        weights: Of tasks by name; 1 for others.
        section: Of the recipe that the weights stand in, for errors.

    Raises:
        RecipeError: A weight is that of no task, or all are 0.
    """
    named = by_id(tables, "task")
    names = sorted(set(named.values()))
    strange = sorted(set(weights) - set(names))
    if strange:
        raise RecipeError(
            f"{section}.task_weights names the task {strange[0]}, of which there is no row",
            f"there are: {', '.join(names)}",
            "no_such_task",
        )
    found = {name: weights.get(name, 1.0) for name in names}
    if not any(found.values()):
        raise RecipeError(f"{section}.task_weights leaves no task a weight above 0", "give one", "no_weight")
    if len(names) < 2 and not weights:
        return Tasks({}, {})
    index = {name: number for number, name in enumerate(names)}
    return Tasks(found, {example: index[task] for example, task in named.items()})


@dataclass(frozen=True)
class NamedLoss:
    """The answers' loss, with the parts of it noted by name.

    Over tasks it is ``sum_i w_i L_i``, each ``L_i`` noted by its task's name; what the branches of a fusion with
    auxiliary losses lose alone is noted by their names.

    Attributes:
        tasks: Of the run; without weights every label token counts 1.
        rules: The model's attention, for packed trees.
        ledger: Where they are noted.
    """

    tasks: Tasks
    rules: MaskRules | None
    ledger: Ledger

    def __call__(self, model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Returns the weighted sum of the loss over the label tokens, and their number."""
        losses_N, owner_N, said = answer_losses(model, batch, self.rules)
        if self.tasks.weights:
            weights_N, by_name = by_task(losses_N, batch["tasks"][owner_N], self.tasks.weights)
            losses_N, said = losses_N * weights_N, [*said, *by_name]
        self.ledger.say(said, training=model.training)
        return losses_N.sum(), losses_N.numel()


def by_parts(made: Batching, tasks: Tasks, ledger: Ledger, *, apart: bool) -> Batching:
    """Returns the batching with the loss in parts; as it is where it has but one.

    Args:
        made: The batching.
        tasks: Of the run.
        ledger: Where the parts are noted.
        apart: Whether the model has auxiliary losses, see ``composite.auxiliary``.
    """
    if not tasks.weights and not apart:
        return made
    return replace(made, batches=tasks.told(made.batches), loss=NamedLoss(tasks, made.rules, ledger))
