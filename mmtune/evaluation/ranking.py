"""Rows with options answered by the likeliest option: label words, and calibration by a content-free input.

A label's score is the log of the sum of its words' probabilities, each the probability of the
whole answer with the token that ends it, so that words of the same first token are told apart.
Shapes: L labels, W words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmtune.records import Example, Message, TextPart, parts_of

Words = Mapping[str, Mapping[str, tuple[str, ...]]]
"""Source to option to all its words; an option that is not there is its own word."""


Shares = dict[int, np.ndarray]
"""Row to the ``(L,)`` log-probabilities of its options."""


def label_words(sources: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[str, ...]]]:
    """Returns each source's label words by the one that is listed.

    Args:
        sources: ``sources`` of the recipe that built the rows.
    """
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for source in sources:
        words = [(own,) if isinstance(own, str) else tuple(own) for own in source.get("verbalizer", {}).values()]
        found.setdefault(source["id"], {}).update({own[0]: own for own in words})
    return found


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation up to the answer, and the words that may answer it.

    Attributes:
        row: Number of the kept row.
        turns: Without the last answer.
        words: Words in the order of their labels.
        owners: Label number of every word.
    """

    row: int
    turns: tuple[Message, ...]
    tools: str
    words: tuple[str, ...]
    owners: tuple[int, ...]

    def conversation(self, word: int) -> tuple[Message, ...]:
        """Returns the conversation that ends with a word."""
        return (*self.turns, Message("assistant", (TextPart(self.words[word]),)))


def label_scores(logprob_W: np.ndarray, owners: Sequence[int]) -> np.ndarray:
    """Returns ``(L,)`` log of the summed probability of each label's words.

    Args:
        logprob_W: Log-probability of every word.
        owners: Label number of every word, every label at least once.
    """
    out_L = np.full(max(owners) + 1, -np.inf)
    for owner, value in zip(owners, logprob_W, strict=True):
        out_L[owner] = np.logaddexp(out_L[owner], value)
    return out_L


def calibrated(score_L: np.ndarray, free_L: np.ndarray) -> np.ndarray:
    """Returns ``(L,)`` log-probabilities after dividing by those of a content-free input.

    The content-free input itself becomes exactly uniform (Zhao et al. 2021, arXiv:2102.09690, with
    W = diag(1 / p_free) and b = 0).

    Args:
        score_L: Scores of the labels for a row.
        free_L: Their scores for the content-free input in the same template.
    """
    divided_L = score_L - free_L
    return divided_L - np.logaddexp.reduce(divided_L)


def question_of_row(row: int, example: Example, words: Words) -> Question | None:
    """Returns what is asked of a row with options, or None when it has none.

    Args:
        row: Its number.
        example: The row.
        words: Label words by source.
    """
    if not example.options:
        return None
    last = example.messages[-1]
    turns = example.messages[:-1] if last.role == "assistant" else example.messages
    own = words.get(example.source, {})
    pairs = [(at, word) for at, option in enumerate(example.options) for word in own.get(option, (option,))]
    owners, texts = zip(*pairs, strict=True)
    return Question(row, turns, example.tools, texts, owners)


def content_free(question: Question, prompt: str) -> Question:
    """Returns the same question about nothing: its last turn is a marked prompt without content or media."""
    asked = replace(question.turns[-1], parts=parts_of(prompt) or (TextPart(""),))
    return replace(question, turns=(*question.turns[:-1], asked))


def rank(
    examples: Mapping[int, Example], words: Words, score: Callable[[Sequence[tuple[Question, int]]], np.ndarray]
) -> dict[int, str]:
    """Returns the likeliest option of every row that has options; arguments as in ``shares``."""
    return {row: examples[row].options[int(own.argmax())] for row, own in shares(examples, words, score).items()}


def shares(
    examples: Mapping[int, Example], words: Words, score: Callable[[Sequence[tuple[Question, int]]], np.ndarray]
) -> Shares:
    """Returns the ``(L,)`` log-probabilities of the options of every row that has some, 1 in sum among them.

    Args:
        examples: Row number to example; ``content_free`` in its metadata asks for calibration.
        words: Label words by source.
        score: Questions with a word's number to ``(N,)`` log-probabilities of these answers.
    """
    asked = [found for row, example in examples.items() if (found := question_of_row(row, example, words))]
    free: dict[tuple[object, ...], Question] = {}
    keys: list[tuple[object, ...] | None] = []
    for question in asked:
        prompt = examples[question.row].metadata.get("content_free")
        if prompt is None:
            keys.append(None)
            continue
        key = (prompt, question.words, question.turns[:-1])
        free.setdefault(key, content_free(question, prompt))
        keys.append(key)
    scores = scores_of([*asked, *free.values()], score)
    empty = dict(zip(free, scores[len(asked) :], strict=True))
    out = {}
    for question, asked_key, score_L in zip(asked, keys, scores, strict=False):
        if asked_key is None:
            out[question.row] = score_L - np.logaddexp.reduce(score_L)
        else:
            out[question.row] = calibrated(score_L, empty[asked_key])
    return out


def scores_of(
    questions: Sequence[Question], score: Callable[[Sequence[tuple[Question, int]]], np.ndarray]
) -> list[np.ndarray]:
    """Returns per question the ``(L,)`` scores of its labels, see ``label_scores``; ``score`` as in ``rank``."""
    pairs = [(question, at) for question in questions for at in range(len(question.words))]
    logprob_N = score(pairs)
    out, start = [], 0
    for question in questions:
        end = start + len(question.words)
        out.append(label_scores(logprob_N[start:end], question.owners))
        start = end
    return out
