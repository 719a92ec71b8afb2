"""Rows with options answered by a soft verbalizer: one vector per option, learned from training rows of a frozen model.

A vector starts as the output embedding of its option's words (their mean, and of a word the mean of its tokens), so
that untrained it scores options of one token as the language model's head does. It is scored against what the head
reads at the last token of the prompt, as in WARP (Hambardzumyan et al. 2021, arXiv:2101.00121) and OpenPrompt's
``SoftVerbalizer``. With the model frozen that is a softmax regression on fixed states, which is convex: its minimum is
found, not approached by steps, and an L2 penalty holds the vectors to their start.

Shapes: R rows, L options, H width, W words, K rank of the states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

STRENGTHS = (0.0, 1.0, 10.0, 100.0, 1_000.0, 10_000.0)
"""How far vectors may leave their start, as scikit-learn's C on states of mean square 1; 0 leaves them there."""
_FOLDS = 5
_UNJUDGED = 1.0
"""The strength where fewer than two labels have rows that can be held out."""
_STEPS = 1000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Labelled:
    """Training rows of one source.

    Attributes:
        states: ``(R, H)`` at the last token of their prompts.
        owners: ``(R,)`` number of every row's option.
        open: ``(R, L)`` whether the row could be answered with an option.
    """

    states: Floats
    owners: NDArray[np.int64]
    open: NDArray[np.bool_]

    def of(self, rows: NDArray[np.int64]) -> Labelled:
        """Returns some of the rows."""
        return Labelled(self.states[rows], self.owners[rows], self.open[rows])


@dataclass(frozen=True)
class SoftVerbalizer:
    """What options are scored by.

    Attributes:
        vectors: ``(L, H)``.
        bias: ``(L,)`` of the head, as it is; 0 where it has none.
        strength: Of ``STRENGTHS``.
        losses: Strength to the mean loss in nats on held-out training rows; empty where none could be held out.
    """

    vectors: Floats
    bias: Floats
    strength: float
    losses: dict[float, float]

    def scores(self, states_RH: NDArray[np.floating]) -> Floats:
        """Returns ``(R, L)`` the logits of the options."""
        return states_RH.astype(np.float64) @ self.vectors.T + self.bias


def start_of(
    head_VH: torch.Tensor, bias_V: torch.Tensor | None, words: Sequence[Sequence[Sequence[int]]]
) -> SoftVerbalizer:
    """Returns the verbalizer that has learned nothing yet.

    Args:
        head_VH: Output embeddings of the language model.
        bias_V: Of the head, or None.
        words: Token ids of every word of every option.
    """

    def mean(values: torch.Tensor) -> Floats:
        rows = [np.mean([_read(values, ids).mean(0) for ids in own], axis=0) for own in words]
        return np.stack(rows)

    bias_L = np.zeros(len(words)) if bias_V is None else mean(bias_V[:, None])[:, 0]
    return SoftVerbalizer(mean(head_VH), bias_L, 0.0, {})


def learned(start: SoftVerbalizer, rows: Labelled) -> SoftVerbalizer:
    """Returns a verbalizer learned from rows, of the strength that does best on rows held out of them.

    Rows are held out of labels that have two or more, so that each label is learned from in every fold.

    Args:
        start: Untrained.
        rows: Of every option at least one.
    """
    count_L = np.bincount(rows.owners)
    if (count_L > 1).sum() < 2:
        return fitted(start, rows, _UNJUDGED)
    folds = min(_FOLDS, int(count_L.max()))
    # The only row of a label is learned from in every fold, and held out in none.
    fold_R = np.where(count_L[rows.owners] > 1, _places_within_label(rows.owners) % folds, -1)
    parts = [(np.flatnonzero(fold_R != one), np.flatnonzero(fold_R == one)) for one in range(folds)]
    losses = {}
    for strength in STRENGTHS:
        nll = [_losses(fitted(start, rows.of(kept), strength), rows.of(out)) for kept, out in parts]
        losses[strength] = float(np.concatenate(nll).mean())
    best = fitted(start, rows, min(STRENGTHS, key=lambda one: losses[one]))
    return SoftVerbalizer(best.vectors, best.bias, best.strength, losses)


def fitted(start: SoftVerbalizer, rows: Labelled, strength: float) -> SoftVerbalizer:
    """Returns the verbalizer that minimises the rows' cross-entropy and the squared way from its start.

    The sum over rows of -log p(option), p the softmax over the row's options, plus |D|^2 / (2 C), where D is what is
    added to the vectors when states are scaled to a mean square of 1; C is ``strength``.
    """
    if not strength:
        return start
    scale = float(np.sqrt((rows.states**2).sum(1).mean())) or 1.0
    # The minimum lies in the span of the states, which is of few dimensions where rows are few.
    left_RK, size_K, right_KH = np.linalg.svd(rows.states / scale, full_matrices=False)
    kept = size_K > size_K.max(initial=0) * 1e-12
    places_RK = torch.from_numpy(left_RK[:, kept] * size_K[kept])
    offset_RL = torch.from_numpy(np.where(rows.open, start.scores(rows.states), -np.inf))
    change_KL = _minimum(places_RK, offset_RL, torch.from_numpy(rows.owners), strength)
    vectors = start.vectors + change_KL.T @ right_KH[kept] / scale
    return SoftVerbalizer(vectors, start.bias, strength, {})


def _minimum(places_RK: torch.Tensor, offset_RL: torch.Tensor, owners_R: torch.Tensor, strength: float) -> Floats:
    change_KL = torch.zeros(places_RK.shape[1], offset_RL.shape[1], dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [change_KL], max_iter=_STEPS, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        search.zero_grad()
        logits_RL = offset_RL + places_RK @ change_KL
        total = torch.nn.functional.cross_entropy(logits_RL, owners_R, reduction="sum")
        total = total + (change_KL**2).sum() / (2 * strength)
        total.backward()
        return total

    search.step(loss)
    found: Floats = change_KL.detach().numpy()
    return found


def _losses(verbalizer: SoftVerbalizer, rows: Labelled) -> Floats:
    scores_RL = np.where(rows.open, verbalizer.scores(rows.states), -np.inf)
    own: Floats = np.logaddexp.reduce(scores_RL, axis=1) - scores_RL[np.arange(len(rows.owners)), rows.owners]
    return own


def _places_within_label(owners_R: NDArray[np.int64]) -> NDArray[np.int64]:
    seen: dict[int, int] = {}
    out = np.empty(len(owners_R), np.int64)
    for row, owner in enumerate(owners_R.tolist()):
        out[row] = seen[owner] = seen.get(owner, -1) + 1
    return out


def _read(values_VH: torch.Tensor, ids: Sequence[int]) -> Floats:
    found: Floats = values_VH[torch.as_tensor(list(ids), device=values_VH.device)].detach().double().cpu().numpy()
    return found
