"""GEPA: reflective mutation over a Pareto front, by the ``gepa`` library, with this package's proposer.

Agrawal et al. 2025, "GEPA: Reflective Prompt Evolution Can Outperform Reinforcement Learning" (arXiv:2507.19457): a
prompt is drawn from those that are best on some dev row, changed after a look at its mistakes on a minibatch of
feedback rows, and scored on all dev rows where it is better on that minibatch. No dev row is a feedback row: what was
mended after a row's mistakes is not judged by that row. A prompt is one component here: instruction, exemplars and
label words change together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mmtune.prompts.search.candidate import Candidate, candidate_of
from mmtune.prompts.search.problem import Method, Problem
from mmtune.prompts.search.proposer import Mistake, Solved
from mmtune.prompts.search.scorer import Scorer
from mmtune.prompts.search.space import Admission

_PART = "prompt"
_TRIES = 10
_DRY_PROPOSALS = 20
"""So many proposals in a row that hold nothing new end the search: the space is used up."""


def gepa(problem: Problem, scorer: Scorer, admission: Admission) -> None:
    """Searches until the budget, or the space, is used up; ``problem`` has feedback rows."""
    from gepa import optimize

    reflection: Any = _Reflection(problem, scorer, admission)
    rows = list(range(problem.rows))
    feedback = list(range(problem.rows, problem.rows + len(problem.feedback)))
    optimize(
        seed_candidate=_packed(problem.space.start),
        trainset=feedback,
        valset=rows,
        adapter=reflection,
        custom_candidate_proposer=reflection.propose,
        reflection_minibatch_size=min(problem.minibatch, len(feedback)),
        stop_callbacks=lambda state: (
            reflection.failure is not None or reflection.dry >= _DRY_PROPOSALS or scorer.budget.left < 1
        ),
        # A minibatch without a mistake would be drawn again and again at no cost.
        skip_perfect_score=False,
        logger=_Silent(),
        seed=problem.seed,
        track_best_outputs=False,
    )
    if reflection.failure is not None:
        raise reflection.failure


class _Reflection:
    """What the library asks: rewards of a prompt, and another prompt after a look at mistakes.

    Attributes:
        dry: Proposals in a row that held nothing new.
        failure: What the proposer raised; the library leaves it out and would ask again for ever.
        propose_new_texts: The library's own seam for proposers, which is left to ``custom_candidate_proposer``.
    """

    propose_new_texts = None

    def __init__(self, problem: Problem, scorer: Scorer, admission: Admission) -> None:
        self._problem, self._scorer, self._admission = problem, scorer, admission
        self._dice = problem.dice("gepa")
        self.dry = 0
        self.failure: BaseException | None = None

    def evaluate(self, batch: Sequence[int], candidate: Mapping[str, str], capture_traces: bool = False) -> Any:
        """Returns the library's batch of rewards; rows that were scored before cost no call."""
        from gepa import EvaluationBatch

        rewards = [float(value) for value in self._scorer(_unpacked(candidate), batch)]
        traces = list(batch) if capture_traces else None
        return EvaluationBatch(outputs=list(batch), scores=rewards, trajectories=traces)

    def make_reflective_dataset(
        self, candidate: Mapping[str, str], evaluated: Any, components: Sequence[str]
    ) -> dict[str, list[dict[str, Any]]]:
        """Returns the rows of a minibatch, the worst first."""
        pairs = sorted(zip(evaluated.scores, evaluated.trajectories, strict=True))
        return {part: [{"row": row, "reward": reward} for reward, row in pairs] for part in components}

    def propose(
        self,
        candidate: Mapping[str, str],
        dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components: Sequence[str],
    ) -> dict[str, str]:
        """Returns a prompt that was not tried before, or the same one where nobody knows another."""
        try:
            return self._mended(candidate, dataset[_PART])
        except BaseException as error:
            self.failure = error
            raise

    def _mended(self, candidate: Mapping[str, str], seen: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        old = _unpacked(candidate)
        best = max(one["reward"] for one in seen)
        worse = [one for one in seen if one["reward"] < best] or list(seen)
        mistakes = [
            Mistake(self._feedback(one["row"]), self._scorer.reply(old, one["row"]), one["reward"]) for one in worse
        ]
        for _ in range(_TRIES):
            fresh = self._admission(self._problem.proposer.mended(old, mistakes, 1, self._dice))
            if fresh:
                self.dry = 0
                return _packed(fresh[0])
        self.dry += 1
        return dict(candidate)

    def _feedback(self, row: int) -> Solved:
        return self._problem.feedback[row - self._problem.rows]


class _Silent:
    def log(self, message: str) -> None:
        """Says nothing: the stage shows its own progress."""


def _packed(candidate: Candidate) -> dict[str, str]:
    return {_PART: json.dumps(candidate.facts(), ensure_ascii=False)}


def _unpacked(candidate: Mapping[str, str]) -> Candidate:
    return candidate_of(json.loads(candidate[_PART]))


METHOD = Method(gepa, lambda problem: 2 * problem.minibatch + problem.rows, "gepa")
