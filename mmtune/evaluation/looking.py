"""What is looked at beside the answers while a model is in memory: its branches, and what its answers rest on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmtune.evaluation.ablation import Ablated, ablation_report, ask_again
from mmtune.evaluation.asking import Asking, Losses
from mmtune.evaluation.branches import Branches, branches_report, measure_branches
from mmtune.evaluation.comparison import ScoredRow
from mmtune.evaluation.pairs import answerer
from mmtune.evaluation.rows import EvalRows


@dataclass(frozen=True)
class Looked:
    """What was seen of one model."""

    branches: Branches | None
    ablated: list[Ablated]


class Looking:
    """Looks at each model that ``ask_each`` has loaded.

    Args:
        processor: The models' processor.
        ways: Way of asking to rows in it, already examined; the last one is looked at.
        asking: How rows are asked.
        kinds: What is taken away, see ``ablation.KINDS``.
        judged: The models that it is taken away from.
        seed: Of the order in which questions change places.

    Attributes:
        found: Model to what was seen, by its name and way in the report.
        judged: Name of the one that something was taken away from, or None.
    """

    def __init__(
        self,
        processor: Any,
        ways: Mapping[str, EvalRows],
        asking: Asking,
        kinds: Sequence[str],
        judged: Sequence[str],
        seed: int,
    ) -> None:
        self._processor, self._asking = processor, asking
        self._way, self._rows = list(ways.items())[-1]
        self._kinds, self._judged, self._seed = kinds, judged, seed
        self.found: dict[str, Looked] = {}
        self.judged: str | None = None

    def __call__(self, name: str, model: Any) -> None:
        """Looks at a model.

        Raises:
            Stopped: A signal came.
        """
        given = self._processor, self._rows.for_model(model), self._asking
        label = answerer(name, self._way)
        kinds = self._kinds if name in self._judged else ()
        ablated = ask_again(label, model, *given, kinds, self._seed) if kinds else []
        self.found[label] = Looked(measure_branches(label, model, *given), ablated)
        self.judged = label if kinds else self.judged


def looked_report(
    looked: Mapping[str, Looked],
    rows: Sequence[ScoredRow],
    texts: Mapping[str, Sequence[str]],
    losses: Mapping[str, Losses],
    *,
    ablated: str | None,
    kinds: Sequence[str],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Returns the report's ``fusion`` (by model) and ``ablation``, None each where there is nothing to say.

    Args:
        looked: By model.
        rows: The kept rows.
        texts: Answers by model.
        losses: Losses by model, where they were asked for.
        ablated: The model that something was taken away from, or None.
        kinds: What was asked to be taken away; may be nothing.
        resamples: Bootstrap samples.
        seed: Of the bootstrap.
    """
    groups = [row.group for row in rows]
    fusion = {
        name: branches_report(own.branches, groups, resamples=resamples, seed=seed)
        for name, own in looked.items()
        if own.branches is not None
    }
    ablation = None
    if ablated is not None:
        own = looked[ablated].ablated
        given = (rows, ablated, texts[ablated], losses.get(ablated), own, kinds)
        ablation = ablation_report(*given, resamples=resamples, seed=seed)
    return {"fusion": fusion or None, "ablation": ablation}
