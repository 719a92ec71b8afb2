"""Black-box tuning against cma itself, and the subspace against the paper's shapes."""

import json
import sys

import cma
import numpy as np
import pytest

from mmtune.errors import CapabilityError, DivergedError, RecipeError
from mmtune.prompts.search import Budget, Candidate, Problem, Scorer, Space, Trace, search
from mmtune.prompts.search.bbt import METHOD, BbtSettings, SoftPrompt, evolution, random_subspace

D, ROWS = 6, 4
CENTRE = np.linspace(-1, 1, D)


def quadratic(candidate, rows):
    """Rewards of soft prompts: an ellipsoid with its best at ``CENTRE``; the hard start earns little."""
    if isinstance(candidate, Candidate):
        return [-100.0] * len(rows)
    return [-float((10.0 ** np.linspace(0, 2, D)) @ (np.array(candidate.z) - CENTRE) ** 2) for _ in rows]


def searched(prompts, seed=0, trace=None, score=quadratic, population=8, minibatch=ROWS):
    problem = Problem(
        Space(Candidate("{prompt}")),
        None,
        rows=ROWS,
        seed=seed,
        population=population,
        minibatch=minibatch,
        settings=BbtSettings(D, 0.5),
    )
    scorer = Scorer(score, ROWS, Budget((prompts + 1) * ROWS), trace or Trace())
    return search(problem, scorer, METHOD, "bbt"), scorer


def test_on_a_quadratic_it_finds_what_cma_finds():
    found, scorer = searched(800)
    scale = 10.0 ** np.linspace(0, 2, D)
    theirs = cma.CMAEvolutionStrategy(np.zeros(D), 0.5, {"popsize": 8, "seed": 1, "verbose": -9, "maxfevals": 800})
    theirs.optimize(lambda z: float(scale @ (z - CENTRE) ** 2))
    assert theirs.result.fbest < 1e-6 and -found.best.score < 1e-6
    assert np.array(found.best.candidate.z) == pytest.approx(theirs.result.xbest, abs=1e-3)
    assert scorer.budget.spent <= 801 * ROWS


def test_the_same_dice_and_losses_are_cmas_own_run():
    before = np.random.get_state()[1].copy()
    ours, theirs = evolution(BbtSettings(D, 0.5), 8, 3), evolution(BbtSettings(D, 0.5), 8, 3)
    for _ in range(5):
        a, b = ours.ask(), theirs.ask()
        assert np.array_equal(a, b)
        ours.tell(a, [float(z @ z) for z in a])
        theirs.tell(b, [float(z @ z) for z in b])
    assert np.array_equal(np.random.get_state()[1], before), "the global dice were thrown"


def test_the_subspace_has_the_papers_shape_and_scale():
    start_VH = np.random.default_rng(0).normal(size=(50, 64))
    settings = BbtSettings(dimension=500, sigma=2.0)
    space = random_subspace(start_VH, 0.3, settings=settings, alpha=1.5, seed=4)
    assert space.matrix_Nd.shape == (50 * 64, 500)
    assert space.matrix_Nd.std() == pytest.approx(1.5 * 0.3 / (np.sqrt(500) * 2.0), rel=0.01)
    assert np.array_equal(space.vectors(SoftPrompt((0.0,) * 500)), start_VH)
    z = np.random.default_rng(1).normal(size=500) * 2.0
    moved = space.vectors(SoftPrompt(tuple(z))) - start_VH
    assert moved.std() == pytest.approx(1.5 * 0.3, rel=0.1), "as far as alpha times the words' own spread"
    assert moved.ravel() == pytest.approx(space.matrix_Nd @ z)
    assert not np.array_equal(random_subspace(start_VH, 0.3, settings=settings, seed=5).matrix_Nd, space.matrix_Nd)


def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path):
    whole = Trace(tmp_path / "whole")
    found, _ = searched(60, 2, whole, minibatch=2)
    whole.close()
    text = (tmp_path / "whole").read_text()
    (tmp_path / "cut").write_text("".join(text.splitlines(keepends=True)[:31]))
    again = Trace(tmp_path / "cut")
    same, _ = searched(60, 2, again, minibatch=2)
    again.close()
    assert (tmp_path / "cut").read_text() == text and same == found


def test_a_budget_below_one_population_is_refused():
    with pytest.raises(RecipeError, match="needs at least") as caught:
        searched(9)
    assert caught.value.exit_code == 2
    searched(12)


def test_a_loss_that_is_no_number_stops_the_search():
    with pytest.raises(DivergedError):
        searched(
            30, score=lambda candidate, rows: [float("nan") if isinstance(candidate, SoftPrompt) else 0.0] * len(rows)
        )


def test_without_cma_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(CapabilityError, match="bbt needs cma") as caught:
        searched(30)
    assert caught.value.exit_code == 4 and "mmtune[prompt]" in caught.value.hint


def test_a_soft_prompt_is_the_same_after_json():
    prompt = SoftPrompt((0.1, -1e-17, 3.0))
    assert SoftPrompt(tuple(json.loads(json.dumps(prompt.facts()))["z"])).key == prompt.key
