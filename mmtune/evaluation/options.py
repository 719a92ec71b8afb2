"""Options scored by their log-probability, for eval and for the search of prompts alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mmtune.encoding.render import EncodedRow
from mmtune.evaluation.ranking import Question, scores_of
from mmtune.evaluation.scoring import RowScorer
from mmtune.records import Medium, Message

Encode = Callable[[Sequence[Message], str], EncodedRow]
"""A conversation and its tools to a row with labels: ``encoding.render.Renderer.encode``."""


def score_words(
    scorer: RowScorer,
    encode: Encode,
    asked: Sequence[tuple[Question, int]],
    advance: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """Returns the ``(N,)`` log-probability of each answer: a word of its question, and the token that ends it.

    Args:
        scorer: Of the model.
        encode: Encodes a conversation.
        asked: Questions, each with the number of a word.
        advance: Told how many answers are done.

    Raises:
        Stopped: The scorer was told to stop.
        Refused: A conversation cannot be encoded.
    """

    def rows(numbers: Sequence[int]) -> list[EncodedRow]:
        return [encode(asked[at][0].conversation(asked[at][1]), asked[at][0].tools) for at in numbers]

    order = by_media([[medium for turn in question.turns for medium in turn.media] for question, _ in asked])
    return scorer(rows, order, advance)[0]


def score_options(
    scorer: RowScorer,
    encode: Encode,
    questions: Sequence[Question],
    advance: Callable[[int], None] = lambda n: None,
) -> list[np.ndarray]:
    """Returns per question the ``(L,)`` log-probability of its labels, see ``ranking.label_scores``.

    Args:
        scorer: Of the model; its ``calls`` count every (question, word) once.
        encode: Encodes a conversation.
        questions: Of any media, in any order.
        advance: Told how many words are done.

    Raises:
        Stopped: The scorer was told to stop.
        Refused: A conversation cannot be encoded.
    """
    return scores_of(questions, lambda asked: score_words(scorer, encode, asked, advance))


def by_media(media: Sequence[Sequence[Medium]]) -> list[int]:
    """Returns row numbers so that rows which begin with the same media stand together, else in their order.

    Args:
        media: Of every row, in reading order.
    """
    numbers: dict[Any, int] = {}

    def key(own: Sequence[Medium]) -> tuple[int, ...]:
        names = ((one.modality, one.path, None if one.path else one.data) for one in own)
        return tuple(numbers.setdefault(name, len(numbers)) for name in names)

    keys = [key(own) for own in media]
    return sorted(range(len(keys)), key=lambda at: keys[at])
