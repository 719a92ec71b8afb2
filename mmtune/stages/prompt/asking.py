"""A frozen model asked with prompts: rewards of dev rows, and scores for the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmtune.encoding.render import Renderer
from mmtune.errors import RecipeError
from mmtune.evaluation import CORPUS_METRICS, measure, metrics_of
from mmtune.evaluation.asking import Answering, Asking
from mmtune.evaluation.options import score_options
from mmtune.evaluation.ranking import Words, question_of_row
from mmtune.evaluation.rows import EvalRows, no_context
from mmtune.media.content import own_name
from mmtune.models.soft_tokens import soft_tokens
from mmtune.prompts.search.reward import WRONG, piecewise
from mmtune.prompts.searched import SearchedPrompt, asked_with, shortenable
from mmtune.records import Example, Medium

_UNASKABLE = {"metric": 0.0, "gap": -1.0, "piecewise": -WRONG, "likelihood": 0.0}
"""Reward of a row that a prompt makes too long, or cannot word."""


@dataclass(frozen=True)
class Answered:
    """What a model made of some rows.

    Attributes:
        rewards: ``(R,)`` what the search wants more of.
        said: The model's answers, labels for label words; empty where it was not asked for words.
        unaskable: Rows that did not fit.
    """

    rewards: np.ndarray
    said: tuple[str, ...]
    unaskable: int


@dataclass
class Asker:
    """Asks one model; everything that stays the same between prompts.

    Attributes:
        model: Frozen.
        processor: Its processor.
        renderer: Encodes conversations.
        media_root: Of the rows.
        max_length: Longest conversation in tokens.
        drop_turns: Let over-long conversations lose whole early turns.
        shorten: Let them lose the end of their context.
        max_new_tokens: Longest answer.
        batch_rows: Rows at once.
        rank: Answer rows with options by the likeliest one.
        words: Label words by source, for ranking.
        should_stop: Asked between batches.
        note: Told what a person should know.
        name: Medium to a name that equal media share.
        calls: Pairs of prompt and row that were asked.
    """

    model: Any
    processor: Any
    renderer: Renderer
    media_root: Path
    max_length: int
    drop_turns: bool
    shorten: bool
    max_new_tokens: int
    batch_rows: int
    rank: bool
    words: Words
    should_stop: Callable[[], bool]
    note: Callable[[str], None]
    name: Callable[[Medium], str] = own_name
    calls: int = 0

    def __post_init__(self) -> None:
        if soft_tokens(self.model) is None:
            self.renderer = self.renderer.without_soft_tokens()
        asking = Asking(
            media_root=self.media_root,
            batch_rows=self.batch_rows,
            max_new_tokens=self.max_new_tokens,
            loss=False,
            rank=self.rank,
            words=self.words,
            should_stop=self.should_stop,
            note=self.note,
        )
        # It stays, and the media that it keeps: the same rows are asked again and again.
        self._model = Answering(self.model, self.processor, asking)

    def answered(self, prompt: SearchedPrompt, examples: Sequence[Example], reward: str) -> Answered:
        """Returns rewards of rows asked with a prompt.

        Args:
            prompt: The prompt.
            examples: Rows of instructions/.
            reward: ``metric``, ``gap``, ``piecewise`` or ``likelihood``.

        Raises:
            Stopped: ``should_stop`` said so.
        """
        self.calls += len(examples)
        asked = [asked_with(prompt, example, self.name) for example in examples]
        at = [place for place, one in enumerate(asked) if isinstance(one, Example)]
        fitting = [one for one in asked if isinstance(one, Example)]
        rows = EvalRows(
            len(fitting),
            fitting.__getitem__,
            self.renderer,
            max_length=self.max_length,
            drop_turns=self.drop_turns,
            context=shortenable if self.shorten else no_context,
        )
        for _ in rows.examine():
            pass
        places = [at[number] for number in rows.kept]
        said = [""] * len(examples)
        values = np.full(len(examples), _UNASKABLE[reward])
        if places and reward == "metric":
            texts = [prompt.label_of(text) for text in self._model.answers(rows, words=self._words(prompt))]
            for place, text in zip(places, texts, strict=True):
                said[place] = text
            values[places] = row_scores([examples[place] for place in places], texts) / 100.0
        elif places:
            values[places] = self._likelihoods(rows) if reward == "likelihood" else self._gaps(prompt, rows)
            values[places] = piecewise(values[places]) if reward == "piecewise" else values[places]
        return Answered(values, tuple(said), len(examples) - len(places))

    def _words(self, prompt: SearchedPrompt) -> Words:
        # Label words of the recipe belong to the labels as they are.
        return {} if prompt.words else self.words

    def _gaps(self, prompt: SearchedPrompt, rows: EvalRows) -> np.ndarray:
        """Returns ``(R,)`` probability of the right option less that of the best wrong one, among the options."""
        examples = [rows.example(row) for row in range(len(rows.kept))]
        questions = [question_of_row(row, one, self._words(prompt)) for row, one in enumerate(examples)]
        asked = [one for one in questions if one is not None]
        assert len(asked) == len(examples), "rows without options are refused before the search"
        scores = score_options(self._model.scorer, rows.encode, asked)
        right = ([option in example.references for option in example.options] for example in examples)
        return np.array([gap(score_L, right_L) for score_L, right_L in zip(scores, right, strict=True)])

    def _likelihoods(self, rows: EvalRows) -> np.ndarray:
        """Returns ``(R,)`` geometric mean of the probabilities of the answer's tokens."""
        nll, tokens = self._model.losses(rows)
        return np.exp(-nll / np.maximum(tokens, 1))


def gap(score_L: np.ndarray, right_L: Sequence[bool]) -> float:
    """Returns the probability of the right options less that of the likeliest wrong one, from -1 to 1.

    Args:
        score_L: Log-probabilities of the options, not normalised.
        right_L: Which of them are right.
    """
    if not np.isfinite(score_L).all():
        # The caller's to refuse.
        return math.nan
    share_L = np.exp(score_L - np.logaddexp.reduce(score_L))
    right_mask = np.asarray(right_L, dtype=bool)
    wrong = float(share_L[~right_mask].max()) if (~right_mask).any() else 0.0
    right = float(share_L[right_mask].sum()) if right_mask.any() else 0.0
    return right - wrong


def row_scores(examples: Sequence[Example], texts: Sequence[str]) -> np.ndarray:
    """Returns ``(R,)`` scores of answers, 0 to 100, each by its row's own metric."""
    values = np.zeros(len(examples))
    for name in dict.fromkeys(metric_of(example) for example in examples):
        places = [at for at, example in enumerate(examples) if metric_of(example) == name]
        found = measure(
            name,
            [texts[at] for at in places],
            [examples[at].references for at in places],
            [examples[at].options for at in places],
        )
        shares = np.divide(found.values, found.weights, out=np.zeros(len(places)), where=found.weights != 0)
        values[places] = shares if found.higher_is_better else np.maximum(0.0, 100.0 - shares)
    return values


def metric_of(example: Example) -> str:
    """Returns the first metric of a row whose value does not depend on other rows."""
    names = metrics_of(example.task, example.metric, None)
    return next((name for name in names if name not in CORPUS_METRICS), "token_f1")


def check_reward(reward: str, examples: Sequence[Example]) -> None:
    """Raises RecipeError where rows cannot give a reward."""
    bare = next((one.id for one in examples if not one.options), None)
    if reward in ("gap", "piecewise") and bare is not None:
        raise RecipeError(
            f"prompt.reward {reward} needs rows with options; {bare} has none",
            "name the options (a column, or =yes|no), or take reward: metric or likelihood",
            "no_options",
        )
