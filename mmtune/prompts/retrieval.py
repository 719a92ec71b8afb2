"""Solved rows that are like a question: which of the nearest are shown, and in which turn they are picked.

Nothing here measures vectors. The caller says who is near (``Near``) and how like two rows of the pool are (``Alike``);
here rows that would give the answer away are left out, and diversity and balance are kept.

Shapes: Q questions, P rows of the pool, N candidates, K exemplars, M media of a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
Near = Callable[[Rows, int], tuple[Rows, NDArray[np.floating]]]
"""Numbers of questions ``(Q,)`` and N to rows of the pool ``(Q, min(N, P))``, nearest first and -1 where none is left,
and their similarities."""
Alike = Callable[[Rows, Rows], NDArray[np.floating]]
"""Rows of the pool ``(Q,)`` and others ``(Q, N)`` to their similarities ``(Q, N)``."""

MMR_CANDIDATES = 32
"""So many of the nearest rows are weighed against each other for diversity."""
_SPARE = 8
_WIDER = 4


@dataclass(frozen=True, slots=True)
class Card:
    """What decides whether a row may be shown before another one.

    Attributes:
        id: Its id, without the mark of a repeated row.
        source: Its source.
        media: Names of its media.
        text: Name of its text where it has no media, else empty: a question may stand with several pictures.
        label: Its answer.
    """

    id: str
    source: str
    media: tuple[str, ...] = ()
    text: str = ""
    label: str = ""


@dataclass(frozen=True)
class Cards:
    """Cards as numbers that are equal where names are.

    Attributes:
        own: ``(P,)`` of ids.
        text: ``(P,)`` of texts, -1 where there is none.
        label: ``(P,)`` of answers.
        media: ``(P, M)`` of media, -1 behind the last.
    """

    own: Rows
    text: Rows
    label: Rows
    media: Rows


@dataclass(frozen=True)
class Numbers:
    """Gives names their numbers; pool and questions must use the same one."""

    _known: dict[tuple[str, str], int] = field(default_factory=dict)

    def of(self, cards: Sequence[Card]) -> Cards:
        """Returns cards as numbers."""
        known = self._known
        most = max((len(card.media) for card in cards), default=0)
        media = np.full((len(cards), most), -1, np.int64)
        plain = np.full((3, len(cards)), -1, np.int64)
        for at, card in enumerate(cards):
            for row, name in enumerate((card.id, card.text, card.label)):
                if name or row != 1:
                    plain[row, at] = known.setdefault((("id", "text", "label")[row], name), len(known))
            for place, name in enumerate(card.media):
                media[at, place] = known.setdefault(("media", name), len(known))
        return Cards(plain[0], plain[1], plain[2], media)


@dataclass(frozen=True, slots=True)
class Wanted:
    """How many exemplars are picked, and how.

    Attributes:
        k: How many.
        diversity: 1 - lambda of maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998): each pick has the
            largest ``lambda * sim(question, row) - (1 - lambda) * max sim(row, picked)``; 0 picks the nearest.
        balance: A label may be picked again only when every label of the pool was, as far as there are rows.
    """

    k: int
    diversity: float = 0.0
    balance: bool = False


def pick(asked: Cards, pool: Cards, near: Near, alike: Alike, wanted: Wanted) -> Rows:
    """Returns ``(Q, K)`` rows of the pool in the order they are picked, -1 where there are no more.

    Never the question's own row, one of the same text without media, or one that shows one of its media. Equal values
    go to the nearer row.

    Args:
        asked: The questions.
        pool: The rows that may be shown.
        near: The nearest rows of questions.
        alike: How like rows of the pool are.
        wanted: How many, and how.
    """
    size, count = len(pool.own), len(asked.own)
    picked = np.full((count, wanted.k), -1, np.int64)
    todo = np.arange(count)
    number = (MMR_CANDIDATES if wanted.diversity else wanted.k) + _SPARE
    labels = len(np.unique(pool.label)) if wanted.balance else 0
    while todo.size and size:
        rows, values = near(todo, number)
        allowed = (rows >= 0) & ~_forbidden(asked, todo, pool, rows)
        whole = number >= size
        found, sure = _picked(rows, values, allowed, pool.label, labels, alike, wanted, whole=whole)
        picked[todo[sure]] = found[sure]
        todo = todo[~sure]
        number *= _WIDER
    return picked


def _forbidden(asked: Cards, todo: Rows, pool: Cards, rows: Rows) -> NDArray[np.bool_]:
    """Returns ``(Q, N)`` whether a candidate is the question itself, says the same or shows one of its media."""
    text = asked.text[todo, None]
    out = (pool.own[rows] == asked.own[todo, None]) | ((text >= 0) & (pool.text[rows] == text))
    shown = pool.media[rows]
    for column in range(asked.media.shape[1]):
        name = asked.media[todo, column, None]
        out |= (name >= 0) & (shown == name[..., None]).any(-1)
    return out


def _picked(
    rows: Rows,
    values: NDArray[np.floating],
    allowed: NDArray[np.bool_],
    label: Rows,
    labels: int,
    alike: Alike,
    wanted: Wanted,
    *,
    whole: bool,
) -> tuple[Rows, NDArray[np.bool_]]:
    """Returns ``(Q, K)`` picks, and ``(Q,)`` whether rows beyond the candidates could not change them.

    Args:
        rows: ``(Q, N)`` candidates, nearest first.
        values: Their similarities.
        allowed: Which of them may be shown.
        label: ``(P,)``.
        labels: Distinct labels of the pool; 0 leaves balance out.
        alike: How like rows of the pool are.
        wanted: How many, and how.
        whole: The candidates are all there are.
    """
    count = len(rows)
    each = np.arange(count)
    free, sure = allowed.copy(), np.full(count, True)
    used, closest = np.zeros(rows.shape, np.int64), np.full(rows.shape, -np.inf)
    out = np.full((count, wanted.k), -1, np.int64)
    room = MMR_CANDIDATES if wanted.diversity else 1
    for turn in range(wanted.k):
        fit = free
        if labels:
            least = np.where(free, used, np.iinfo(np.int64).max).min(axis=1) if whole else turn // labels
            fit = free & (used == np.reshape(least, (-1, 1)))
        sure &= whole | (fit.sum(axis=1) >= room)
        fit = fit & (np.cumsum(fit, axis=1) <= room)
        score = values if not (wanted.diversity and turn) else _relevance(values, closest, wanted.diversity)
        best = np.where(fit, score, -np.inf).argmax(axis=1)
        there = np.asarray(fit.any(axis=1), np.bool_)
        chosen = rows[each, best]
        out[there, turn] = chosen[there]
        free[each, best] &= ~there
        if labels:
            used += there[:, None] & (label[rows] == label[chosen][:, None])
        if wanted.diversity:
            closest = np.maximum(closest, np.where(there[:, None], alike(chosen, rows), -np.inf))
    return out, sure


def _relevance(values: NDArray[np.floating], closest: NDArray[np.floating], diversity: float) -> NDArray[np.floating]:
    return (1 - diversity) * values - diversity * closest


def majority(labels: Iterable[str]) -> str:
    """Returns the most frequent answer, of equally frequent ones the first; empty without any."""
    counts = Counter(labels)
    return max(counts, key=lambda name: counts[name]) if counts else ""
