"""What a search asks: rewards of a prompt on dev rows, within a budget, written down, never asked twice.

Shapes: R rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmtune.errors import DivergedError
from mmtune.prompts.search.budget import Budget
from mmtune.prompts.search.candidate import Scorable
from mmtune.prompts.search.trace import Trace

Score = Callable[[Any, Sequence[int]], Sequence[float]]
"""Prompt and numbers of rows to one reward per row, higher is better: the only thing that calls a model."""

_LONGEST = 200
"""Characters of a reply that are kept."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A prompt that was scored on every dev row, and its mean reward."""

    candidate: Any
    score: float


@dataclass
class Scorer:
    """Scores prompts.

    Attributes:
        score: Calls the model.
        rows: Number of dev rows; they are numbered from 0. Rows behind them cost calls as well, and choose nothing.
        budget: Counts the calls.
        trace: Keeps the rewards.
        tell: Told of every new line of the trace.
        said: Prompt and rows that were just scored to the model's words, or None where a method has no use for them.
        best: The best prompt that was scored on all rows so far; of equals the first.
        full: Every prompt that was scored on all rows, in the order it was.
    """

    score: Score
    rows: int
    budget: Budget
    trace: Trace = field(default_factory=Trace)
    tell: Callable[[dict[str, Any]], None] = lambda line: None
    said: Callable[[Any, Sequence[int]], Sequence[str]] | None = None
    best: Scored | None = None
    full: list[Scored] = field(default_factory=list)
    _known: dict[str, dict[int, float]] = field(default_factory=dict)
    _replies: dict[tuple[str, int], str] = field(default_factory=dict)

    def __call__(self, candidate: Scorable, rows: Sequence[int] | None = None) -> np.ndarray:
        """Returns ``(R,)`` rewards of a prompt.

        Only rows that it was not scored on before cost a call.

        Args:
            candidate: The prompt.
            rows: Numbers of rows; None for all dev rows.

        Raises:
            Exhausted: The budget does not reach; nothing was asked.
            DivergedError: A reward is no number.
        """
        wanted = tuple(range(self.rows)) if rows is None else tuple(rows)
        known = self._known.get(candidate.key, {})
        fresh = [row for row in dict.fromkeys(wanted) if row not in known]
        if fresh:
            self.budget.spend(len(fresh))
            self._ask(candidate, fresh, known)
            self._known[candidate.key] = known
        return np.array([known[row] for row in wanted])

    def mean(self, candidate: Scorable) -> float:
        """Returns a prompt's mean reward over the dev rows that it was scored on so far; minus infinity before that."""
        judged = self._judged(self._known.get(candidate.key, {}))
        return sum(judged) / len(judged) if judged else -math.inf

    @property
    def tried(self) -> int:
        """Number of prompts that were scored, on some rows or all."""
        return len(self._known)

    def reply(self, candidate: Scorable, row: int) -> str:
        """Returns what the model said to a row that a prompt was scored on; empty where nobody kept it."""
        return self._replies.get((candidate.key, row), "")

    def seen(self, candidate: Scorable) -> bool:
        """Says whether a prompt was scored on every dev row."""
        return len(self._judged(self._known.get(candidate.key, {}))) == self.rows

    def _judged(self, known: Mapping[int, float]) -> list[float]:
        """Returns the rewards of dev rows alone."""
        return [reward for row, reward in known.items() if row < self.rows]

    def _ask(self, candidate: Scorable, fresh: Sequence[int], known: dict[int, float]) -> None:
        places = hashlib.blake2b(repr(list(fresh)).encode(), digest_size=4).hexdigest()

        def make() -> dict[str, Any]:
            rewards = [float(value) for value in self.score(candidate, fresh)]
            if len(rewards) != len(fresh):
                raise ValueError(f"{len(rewards)} rewards for {len(fresh)} rows")
            if not all(map(math.isfinite, rewards)):
                raise DivergedError(
                    f"the reward of a prompt is {next(value for value in rewards if not math.isfinite(value))}",
                    "the model's logits are not finite; try `finetune.precision: fp32` or another model",
                    "nan_reward",
                )
            judged = self._judged({**known, **dict(zip(fresh, rewards, strict=True))})
            score = sum(judged) / len(judged) if judged else sum(rewards) / len(rewards)
            # Rows behind the dev rows make nothing whole that was whole before.
            whole = len(judged) == self.rows and min(fresh) < self.rows
            best = self.best.score if self.best is not None else None
            return {
                "candidate": candidate.facts(),
                "rows": list(fresh),
                "rewards": rewards,
                **({} if self.said is None else {"said": [text[:_LONGEST] for text in self.said(candidate, fresh)]}),
                "score": score,
                "full": whole,
                "calls": self.budget.spent,
                "best": max(score, best) if whole and best is not None else score if whole else best,
            }

        line = self.trace.step("score", f"{candidate.key}/{places}", make)
        known.update(zip(line["rows"], line["rewards"], strict=True))
        self._replies.update(
            {(candidate.key, row): text for row, text in zip(line["rows"], line.get("said", ()), strict=False)}
        )
        if line["full"]:
            found = Scored(candidate, line["score"])
            self.full.append(found)
            if self.best is None or found.score > self.best.score:
                self.best = found
        self.tell(line)
