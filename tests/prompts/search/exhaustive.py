"""A prompt space small enough to be searched exhaustively: the oracle of every method."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mmtune.prompts.search import Candidate, Mistake, Problem, Scored, Solved, Space

FIRST = tuple(f"first{at}" for at in range(12))
SECOND = tuple(f"second{at}" for at in range(12))
IDS = ("a", "b", "c")
ROWS = 20
FEEDBACK = 10


def text(first: str, second: str) -> str:
    return f"{first} {second} {{prompt}}"


SPACE = Space(
    start=Candidate(text(FIRST[0], SECOND[0])),
    vary=frozenset({"instruction", "exemplars", "verbalizer"}),
    exemplars=IDS,
    shots=1,
    verbalizers=3,
)


@dataclass(frozen=True)
class GridProposer:
    """Changes one coordinate at a time, or draws both words."""

    space: Space = SPACE

    def first(self, count: int, dice: random.Random) -> list[Candidate]:
        return [self.space.draw(text(dice.choice(FIRST), dice.choice(SECOND)), dice) for _ in range(count)]

    def near(self, candidate: Candidate, count: int, dice: random.Random) -> list[Candidate]:
        out = []
        for _ in range(count):
            first, second, _ = candidate.instruction.split()
            ways = [
                replace(candidate, instruction=text(dice.choice(FIRST), second)),
                replace(candidate, instruction=text(first, dice.choice(SECOND))),
                replace(candidate, exemplars=self.space.draw_exemplars(dice)),
                replace(candidate, verbalizer=dice.randrange(3)),
            ]
            out.append(dice.choice(ways))
        return out

    def after(self, history: Sequence[Scored], count: int, dice: random.Random) -> list[Candidate]:
        return [self.near(dice.choice(history[-4:]).candidate, 1, dice)[0] for _ in range(count)]

    def mended(
        self, candidate: Candidate, mistakes: Sequence[Mistake], count: int, dice: random.Random
    ) -> list[Candidate]:
        return self.near(candidate, count, dice)


def all_candidates() -> list[Candidate]:
    sets = [(), *((one,) for one in IDS)]
    pairs = itertools.product(FIRST, SECOND, sets, range(3))
    return [Candidate(text(first, second), shown, words) for first, second, shown, words in pairs]


@dataclass
class Landscape:
    """Rewards of every prompt on every row: parts add up, with a noise of each row that stays."""

    seed: int
    calls: int = 0
    asked: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        dice = np.random.default_rng(self.seed)
        self._first = dict(zip(FIRST, dice.random(12), strict=True))
        self._second = dict(zip(SECOND, dice.random(12), strict=True))
        self._shown = dict(zip([(), *((one,) for one in IDS)], dice.random(4), strict=True))
        self._words = dice.random(3)
        self._noise = 0.3 * dice.standard_normal((ROWS + FEEDBACK, 12))

    def rewards(self, candidate: Candidate, rows: Sequence[int]) -> list[float]:
        first, second, _ = candidate.instruction.split()
        parts = self._first[first], self._second[second], self._shown[candidate.exemplars]
        whole = sum(parts) + float(self._words[candidate.verbalizer])
        return [float(whole + self._noise[row, FIRST.index(first)]) for row in rows]

    def __call__(self, candidate: Candidate, rows: Sequence[int]) -> list[float]:
        self.calls += len(rows)
        self.asked.append((candidate.key, tuple(rows)))
        return self.rewards(candidate, rows)

    def means(self) -> dict[str, float]:
        return {one.key: float(np.mean(self.rewards(one, range(ROWS)))) for one in all_candidates()}


def problem(seed: int, **settings: object) -> Problem:
    feedback = tuple(Solved(str(row), f"row {row}", "yes" if row % 2 else "no") for row in range(ROWS, ROWS + FEEDBACK))
    chosen = {"population": 8, "minibatch": 6, **settings}
    return Problem(SPACE, GridProposer(), rows=ROWS, seed=seed, feedback=feedback, **chosen)  # type: ignore[arg-type]
