"""Soft verbalizers: untrained the head's own scores, trained scikit-learn's logistic regression."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from mmtune.evaluation.soft_verbalizer import STRENGTHS, Labelled, SoftVerbalizer, fitted, learned, start_of

WIDTH = 6


def rows_of(seed: int, count: int = 40, labels: int = 3, spread: float = 1.0, width: int = WIDTH) -> Labelled:
    dice = np.random.default_rng(seed)
    owners = np.concatenate([np.arange(labels), dice.integers(labels, size=count - labels)])
    centres = spread * dice.normal(size=(labels, width))
    states = dice.normal(size=(count, width)) + centres[owners] + 3
    return Labelled(states, owners, np.ones((count, labels), bool))


def nothing(labels: int = 3, width: int = WIDTH) -> SoftVerbalizer:
    return SoftVerbalizer(np.zeros((labels, width)), np.zeros(labels), 0.0, {})


def test_untrained_it_scores_as_the_head_does():
    torch.manual_seed(0)
    head = torch.nn.Linear(WIDTH, 20)
    start = start_of(head.weight, head.bias, [[[4]], [[7], [9]], [[1, 2, 3]]])
    states = torch.randn(5, WIDTH)
    logits = head(states).detach().numpy()
    found = start.scores(states.numpy())
    np.testing.assert_allclose(found[:, 0], logits[:, 4], atol=1e-5)
    # Several words, and several tokens of a word, stand by their mean.
    np.testing.assert_allclose(found[:, 1], (logits[:, 7] + logits[:, 9]) / 2, atol=1e-5)
    np.testing.assert_allclose(found[:, 2], logits[:, 1:4].mean(1), atol=1e-5)
    assert not start_of(head.weight, None, [[[4]], [[5]]]).bias.any()


@pytest.mark.parametrize("strength", STRENGTHS[1:])
@pytest.mark.parametrize("width", [WIDTH, 60])
def test_from_nothing_it_is_scikit_learns_regression(strength: float, width: int):
    rows = rows_of(1, width=width)
    found = fitted(nothing(width=width), rows, strength)
    scale = np.sqrt((rows.states**2).sum(1).mean())
    told = LogisticRegression(C=strength, fit_intercept=False, tol=1e-10, max_iter=100_000)
    told.fit(rows.states / scale, rows.owners)
    asked = rows_of(2, width=width).states
    np.testing.assert_allclose(_shares(found, asked), told.predict_proba(asked / scale), atol=1e-4)


def test_of_two_labels_it_is_the_binary_regression_of_half_the_penalty():
    rows = rows_of(3, labels=2)
    scale = np.sqrt((rows.states**2).sum(1).mean())
    told = LogisticRegression(C=20, fit_intercept=False, tol=1e-10, max_iter=100_000)
    told.fit(rows.states / scale, rows.owners)
    found = fitted(nothing(2), rows, 10)
    np.testing.assert_allclose(_shares(found, rows.states), told.predict_proba(rows.states / scale), atol=1e-4)


def test_the_penalty_holds_it_to_its_words_and_options_of_other_rows_are_left_out():
    dice, rows = np.random.default_rng(4), rows_of(4, count=24)
    open_RL = rows.open.copy()
    open_RL[::2] = False
    open_RL[np.arange(24), rows.owners] = True
    open_RL[np.arange(24), (rows.owners + 1) % 3] = True
    rows = Labelled(rows.states, rows.owners, open_RL)
    start = SoftVerbalizer(dice.normal(size=(3, WIDTH)), dice.normal(size=3), 0.0, {})
    scale = np.sqrt((rows.states**2).sum(1).mean())

    def cost(flat: np.ndarray) -> float:
        change = flat.reshape(3, WIDTH)
        scores = rows.states @ (start.vectors + change / scale).T + start.bias
        own = [
            np.log(np.exp(score[free] - score[owner]).sum())
            for score, free, owner in zip(scores, open_RL, rows.owners, strict=True)
        ]
        return sum(own) + (change**2).sum() / 20

    told = minimize(cost, np.zeros(3 * WIDTH), tol=1e-12).x.reshape(3, WIDTH)
    found = fitted(start, rows, 10)
    np.testing.assert_allclose(found.vectors, start.vectors + told / scale, atol=1e-4)
    assert fitted(start, rows, 0) is start
    np.testing.assert_allclose(fitted(start, rows, 1e-9).vectors, start.vectors, atol=1e-6)


def test_the_strength_is_the_one_that_does_best_on_rows_held_out():
    rows = rows_of(5, count=60, spread=0.3)
    found = learned(nothing(), rows)
    assert set(found.losses) == set(STRENGTHS) and found.losses[0.0] == pytest.approx(np.log(3))
    # Five folds by hand: of every label the first row is held out first, and so on.
    place = [int((rows.owners[:row] == owner).sum()) % 5 for row, owner in enumerate(rows.owners)]
    total = 0.0
    for fold in range(5):
        out = np.array(place) == fold
        part = fitted(nothing(), rows.of(np.flatnonzero(~out)), 10.0)
        total -= np.log(_shares(part, rows.states[out])[np.arange(out.sum()), rows.owners[out]]).sum()
    assert found.losses[10.0] == pytest.approx(total / 60)
    assert found.strength == min(STRENGTHS, key=found.losses.__getitem__)
    np.testing.assert_array_equal(found.vectors, fitted(nothing(), rows, found.strength).vectors)


def test_the_only_row_of_a_label_is_learned_from_in_every_fold():
    rows = rows_of(6, count=43, labels=4, spread=0.3)
    rows = rows.of(np.flatnonzero((rows.owners < 3) | (np.arange(43) == 3)))
    rare, found = int(np.flatnonzero(rows.owners == 3)[0]), learned(nothing(4), rows)
    place = [int((rows.owners[:row] == owner).sum()) % 5 for row, owner in enumerate(rows.owners)]
    total = 0.0
    for fold in range(5):
        out = (np.array(place) == fold) & (np.arange(len(rows.owners)) != rare)
        part = fitted(nothing(4), rows.of(np.flatnonzero(~out)), 10.0)
        total -= np.log(_shares(part, rows.states[out])[np.arange(out.sum()), rows.owners[out]]).sum()
    assert found.losses[10.0] == pytest.approx(total / (len(rows.owners) - 1))
    assert found.strength == min(STRENGTHS, key=found.losses.__getitem__)


@pytest.mark.parametrize("more", [0, 4])
def test_where_no_two_labels_have_two_rows_none_is_held_out(more: int):
    rows = rows_of(6, count=3)
    rows = rows.of(np.array([0, 1, 2, *[2] * more]))
    found = learned(nothing(), rows)
    assert found.strength == 1.0 and not found.losses


def _shares(found: SoftVerbalizer, states: np.ndarray) -> np.ndarray:
    scores = np.exp(found.scores(states) - found.scores(states).max(1, keepdims=True))
    return scores / scores.sum(1, keepdims=True)
