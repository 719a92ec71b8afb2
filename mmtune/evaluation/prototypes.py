"""Rows with options answered by the nearest prototype: the mean state of the training rows of a label.

A row's state is what the language model's head reads at the last token of the prompt. The nearest mean by squared
Euclidean distance is the rule of prototypical networks (Snell et al. 2017, arXiv:1703.05175), here over a model that
is not trained for it; as a verbalizer that needs no label words see Cui et al. 2022 (arXiv:2203.09770), who train the
prototypes.

Shapes: R rows, B batch, K kept positions, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmtune.evaluation.generation import Collate, Rows, model_batches, takes_positions
from mmtune.evaluation.rows import EvalRows

Label = tuple[str, str]
"""A source and one of its options."""
Means = Mapping[Label, NDArray[np.float64]]
"""A label to its prototype ``(H,)``."""


@dataclass(frozen=True)
class SolvedRows:
    """Training rows that a verbalizer without label words is made of.

    Attributes:
        rows: They, examined.
        labels: The label of every kept row.
        soft: Whether vectors of the options are learned from them, see ``soft_verbalizer``; else they are prototypes.
    """

    rows: EvalRows
    labels: tuple[Label, ...]
    soft: bool = False


def prompt_states(
    model: Any,
    rows: Rows,
    collate: Collate,
    *,
    sizes: Sequence[int],
    batch_rows: int,
    advance: Callable[[int], None] = lambda n: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> NDArray[np.float32]:
    """Returns ``(R, H)`` what the head reads at the last token of every prompt.

    Args:
        model: A transformers or PEFT model with one head, which reads each row once.
        rows: Row numbers to encoded prompts.
        collate: Prompts to a batch padded on the right.
        sizes: Length of every prompt in tokens.
        batch_rows: Prompts per batch.
        advance: Told how many rows are done.
        should_stop: Asked before every batch.

    Raises:
        Stopped: ``should_stop`` returned True.
    """
    bare = model.get_base_model() if hasattr(model, "peft_config") else model
    keeps, read = takes_positions(model), []
    hook = bare.get_output_embeddings().register_forward_pre_hook(lambda _, given: read.append(given[0]))
    out_RH: NDArray[np.float32] = np.empty((0, 0), np.float32)
    try:
        for chosen, batch in model_batches(
            model, rows, collate, sizes=sizes, batch_rows=batch_rows, advance=advance, should_stop=should_stop
        ):
            batch.pop("labels", None)
            last_B = torch.tensor([sizes[row] - 1 for row in chosen], device=batch["input_ids"].device)
            kept_K = last_B.unique()
            read.clear()
            with torch.inference_mode():
                model(**batch, use_cache=False, **({"logits_to_keep": kept_K} if keeps else {}))
            (state_BKH,) = read
            place_B = torch.searchsorted(kept_K, last_B) if keeps else last_B
            state_BH = state_BKH[torch.arange(len(chosen), device=place_B.device), place_B].float().cpu().numpy()
            out_RH = out_RH if out_RH.size else np.empty((len(sizes), state_BH.shape[1]), np.float32)
            out_RH[chosen] = state_BH
    finally:
        hook.remove()
    return out_RH


def prototypes(states_RH: NDArray[np.float32], labels: Sequence[Label]) -> dict[Label, NDArray[np.float64]]:
    """Returns the mean state of every label."""
    owners: dict[Label, list[int]] = {}
    for row, label in enumerate(labels):
        owners.setdefault(label, []).append(row)
    return {label: states_RH[own].astype(np.float64).mean(0) for label, own in owners.items()}


def nearest_option(state_H: NDArray[np.float32], source: str, options: Sequence[str], means: Means) -> str | None:
    """Returns the option whose prototype is nearest, of equally near ones the first; None where none has one."""
    known = [option for option in options if (source, option) in means]
    far = [float(((means[source, option] - state_H) ** 2).sum()) for option in known]
    return known[int(np.argmin(far))] if known else None
