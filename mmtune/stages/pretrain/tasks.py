"""Which task every row of instructions/ belongs to, for losses by task."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmtune.errors import RecipeError
from mmtune.recipe import Recipe
from mmtune.storage import open_split

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Tasks:
    """The tasks of a run.

    Attributes:
        weights: Of every task by its name, in the order of the numbers; empty where there is one.
        of_example: Example ids to the numbers.
    """

    weights: Mapping[str, float]
    of_example: Mapping[str, int]

    def numbers(self, ids: Collection[str]) -> np.ndarray | None:
        """Returns ``(n,)`` the number of each example's task; None where there is one task."""
        import numpy as np

        return np.array([self.of_example[one] for one in ids], dtype=np.int64) if self.weights else None


def tasks_of(recipe: Recipe, splits: Collection[str], weights: Mapping[str, float]) -> Tasks:
    """Returns the tasks of some splits of instructions/.

    Args:
        recipe: The recipe.
        splits: Their names.
        weights: Of tasks by name; 1 for others.

    Raises:
        RecipeError: A weight is that of no task, or all are 0.
    """
    named: dict[str, str] = {}
    for split in splits:
        table = open_split(recipe.run_dir / "instructions" / split)
        named.update(zip(table["id"].to_pylist(), table["task"].to_pylist(), strict=True))
    names = sorted(set(named.values()))
    strange = sorted(set(weights) - set(names))
    if strange:
        raise RecipeError(
            f"pretrain.task_weights names the task {strange[0]}, of which there is no row",
            f"there are: {', '.join(names)}",
            "no_such_task",
        )
    found = {name: weights.get(name, 1.0) for name in names}
    if not any(found.values()):
        raise RecipeError("pretrain.task_weights leaves no task a weight above 0", "give one", "no_weight")
    if len(names) < 2:
        return Tasks({}, {})
    index = {name: number for number, name in enumerate(names)}
    return Tasks(found, {example: index[task] for example, task in named.items()})
