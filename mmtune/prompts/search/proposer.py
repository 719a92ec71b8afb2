"""Who proposes prompts: the four questions that searches ask, whatever answers them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mmtune.prompts.search.candidate import Candidate
from mmtune.prompts.search.scorer import Scored


@dataclass(frozen=True, slots=True)
class Solved:
    """A training row with its answer, as a proposer reads it.

    Attributes:
        id: Of the row.
        asked: What the row says, without its media.
        answer: The right answer.
        options: Its closed answer set, or empty.
    """

    id: str
    asked: str
    answer: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Mistake:
    """A feedback row that a prompt did badly on.

    Attributes:
        row: The row.
        said: What the model answered; empty where it was not asked for words.
        reward: What that was worth.
    """

    row: Solved
    said: str
    reward: float


class Proposer(Protocol):
    """Proposes prompts; what it proposes may be refused, see ``space.Admission``.

    Every method returns at most ``count`` prompts (fewer, or none, where it knows no more) and takes its
    dice from the caller: equal dice and equal arguments give equal prompts.
    """

    def first(self, count: int, dice: random.Random) -> list[Candidate]:
        """Returns prompts to begin with, induced from examples."""

    def near(self, candidate: Candidate, count: int, dice: random.Random) -> list[Candidate]:
        """Returns variants that mean about the same."""

    def after(self, history: Sequence[Scored], count: int, dice: random.Random) -> list[Candidate]:
        """Returns prompts that may be better than those tried; the best of the history stands last."""

    def mended(
        self, candidate: Candidate, mistakes: Sequence[Mistake], count: int, dice: random.Random
    ) -> list[Candidate]:
        """Returns prompts that may avoid a prompt's mistakes."""
