"""MIPRO: a tree-structured Parzen estimator chooses instruction, exemplars and label words together.

Opsahl-Ong et al. 2024, "Optimizing Instructions and Demonstrations for Multi-Stage Language Model Programs"
(arXiv:2406.11695): instructions and sets of exemplars are proposed first; trials are scored on minibatches; every few
trials the combination with the best mean so far is scored on all rows, and the best of these is the result.
"""

from __future__ import annotations

from typing import Any

from mmtune.prompts.search.candidate import Candidate
from mmtune.prompts.search.problem import Method, Problem
from mmtune.prompts.search.scorer import Scorer
from mmtune.prompts.search.space import Admission

_FULL_EVERY = 5
_DRY_TRIALS = 20
"""So many trials in a row that cost nothing end the search: what the estimator still wants to see is known."""


def mipro(problem: Problem, scorer: Scorer, admission: Admission) -> None:
    """Searches until the budget is used up, or every combination is known."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    dice = problem.dice("mipro")
    choices = _choices(problem, admission)
    sampler = optuna.samplers.TPESampler(seed=problem.seed % 2**32, multivariate=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    batch_rows = min(problem.minibatch, problem.rows)
    met: dict[str, Candidate] = {}
    dry, trials = 0, 0
    while dry < _DRY_TRIALS:
        trial = study.ask()
        picked = {name: trial.suggest_categorical(name, list(range(len(ways)))) for name, ways in choices.items()}
        one = Candidate(**{name: choices[name][at] for name, at in picked.items()})
        batch = sorted(dice.sample(range(problem.rows), batch_rows))
        before = scorer.budget.spent
        study.tell(trial, float(scorer(one, batch).mean()))
        met[one.key] = one
        dry = dry + 1 if scorer.budget.spent == before else 0
        trials += 1
        if trials % _FULL_EVERY == 0:
            _score_the_best(met, scorer)


def _choices(problem: Problem, admission: Admission) -> dict[str, list[Any]]:
    """Returns the values of every part of a prompt, those of the start first."""
    space, dice = problem.space, problem.dice("mipro choices")
    instructions = [space.start.instruction]
    if "instruction" in space.vary:
        proposed = problem.proposer.first(problem.population, dice)
        proposed += problem.proposer.near(space.start, 2 * problem.population, dice)
        bare = [Candidate(one.instruction, space.start.exemplars, space.start.verbalizer) for one in proposed]
        instructions += [one.instruction for one in admission(bare)]
    exemplars = [space.start.exemplars]
    if "exemplars" in space.vary:
        exemplars += [space.draw_exemplars(dice) for _ in range(2 * problem.population)]
    verbalizers = list(range(space.verbalizers)) if "verbalizer" in space.vary else [space.start.verbalizer]
    return {
        "instruction": instructions[: 2 * problem.population],
        "exemplars": list(dict.fromkeys(exemplars))[: problem.population],
        "verbalizer": verbalizers,
    }


def _score_the_best(met: dict[str, Candidate], scorer: Scorer) -> None:
    """Scores the combination with the best mean, of those not scored on all rows yet, on all rows."""
    open_ = [one for one in met.values() if not scorer.seen(one)]
    if open_:
        scorer(max(open_, key=scorer.mean))


METHOD = Method(mipro, lambda problem: _FULL_EVERY * min(problem.minibatch, problem.rows) + problem.rows, "optuna")
