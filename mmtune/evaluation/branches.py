"""What each branch of a late or hybrid fusion would have said, and how much the gate trusted it.

Shapes: N rows, K branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmtune.evaluation.asking import Asking
from mmtune.evaluation.comparison import perplexities
from mmtune.evaluation.generation import Stopped, batches, to_model
from mmtune.evaluation.intervals import bootstrap
from mmtune.evaluation.rows import EvalRows
from mmtune.models.composite.scores import branch_scores, branches_of
from mmtune.models.encoder_outputs import base_of
from mmtune.records import READ_BY


@dataclass(frozen=True)
class Branches:
    """Per row, of the reference answers.

    Attributes:
        names: ``joint`` and modalities.
        nll: ``(N, K)`` summed negative log-likelihood by each branch alone.
        tokens: ``(N,)``.
        gate: ``(N, K)`` mean weight.
        entropy: ``(N,)`` mean entropy of the gate in nats.
        there: Bool ``(N, K)``, whether the row has what the branch reads.
    """

    names: tuple[str, ...]
    nll: np.ndarray
    tokens: np.ndarray
    gate: np.ndarray
    entropy: np.ndarray
    there: np.ndarray


def measure_branches(name: str, model: Any, processor: Any, rows: EvalRows, asking: Asking) -> Branches | None:
    """Returns the branches' part in every row's answer; None for a model that mixes none.

    Args:
        name: Of the model, for progress.
        model: Loaded.
        processor: Its processor.
        rows: Already examined.
        asking: How rows are asked.

    Raises:
        Stopped: ``asking.should_stop`` said so.
    """
    names = branches_of(model)
    if len(names) < 2:
        return None
    count = len(rows.kept)
    nll, gate, there = np.zeros((count, len(names))), np.zeros((count, len(names))), np.zeros((count, len(names)), bool)
    tokens, entropy = np.zeros(count), np.zeros(count)
    collate = asking.collator(processor)
    with asking.progress(count, f"eval {name} branches") as bar:
        for chosen in batches(rows.row_sizes, asking.batch_rows):
            if asking.should_stop():
                raise Stopped
            encoded = rows.conversations(chosen)
            batch = to_model(collate(encoded), model)
            found = branch_scores(base_of(model), batch)
            nll[chosen], gate[chosen] = found.nll.double().cpu().numpy(), found.gate.double().cpu().numpy()
            tokens[chosen] = (batch["labels"][:, 1:] != -100).sum(1).cpu().numpy()
            entropy[chosen] = found.entropy.double().cpu().numpy()
            for row, own in zip(chosen, encoded, strict=True):
                kinds = {READ_BY[span.medium.modality] for span in own.media}
                there[row] = [branch == "joint" or branch in kinds for branch in names]
            bar.advance(len(chosen))
    return Branches(names, nll, tokens, gate, entropy, there)


def branches_report(found: Branches, groups: Sequence[str], *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Returns mean weight and perplexity of every branch, each over the rows that have what it reads.

    Args:
        found: What was measured.
        groups: ``(N,)`` equal for rows that show the same media.
        resamples: Bootstrap samples.
        seed: Of the bootstrap.
    """
    sure: dict[str, int] = {"resamples": resamples, "seed": seed}
    names = np.asarray(groups, dtype=object)
    table = {}
    for place, branch in enumerate(found.names):
        rows = np.flatnonzero(found.there[:, place])
        if not rows.size:
            continue
        own = list(names[rows])
        losses = {branch: (found.nll[rows, place], found.tokens[rows])}
        weight = bootstrap(found.gate[rows, place], weights=None, groups=own, **sure)
        table[branch] = {
            "n": int(rows.size),
            "weight": {key: round(getattr(weight, key), 4) for key in ("value", "low", "high")},
            "perplexity": perplexities(losses, own, **sure)["models"][branch],
        }
    return {"n": len(found.tokens), "gate_entropy": round(float(found.entropy.mean()), 4), "branches": table}
