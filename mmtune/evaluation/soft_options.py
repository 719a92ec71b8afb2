"""Options of rows chosen by soft verbalizers, one for every source: what stands between examples and matrices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmtune.evaluation.options import Encode
from mmtune.evaluation.ranking import Words, question_of_row
from mmtune.evaluation.rows import answer_of
from mmtune.evaluation.soft_verbalizer import Labelled, SoftVerbalizer, learned, start_of
from mmtune.records import Example

_NAMED = 5


@dataclass(frozen=True)
class InStates:
    """Rows and the states that they leave the model in.

    Attributes:
        examples: Rows.
        states: ``(R, H)`` of theirs.
    """

    examples: Sequence[Example]
    states: NDArray[np.float32]


@dataclass(frozen=True)
class WordTokens:
    """Which tokens a label's words are, where they stand in an answer.

    Attributes:
        words: Label words by source.
        encode: Encodes a conversation.
        control: Ids of control tokens: those that end an answer are no part of a word.
    """

    words: Words
    encode: Encode
    control: frozenset[int]

    def of(self, example: Example) -> dict[str, list[list[int]]]:
        """Returns every option of a row to the tokens of its words."""
        question = question_of_row(0, example, self.words)
        found: dict[str, list[list[int]]] = {option: [] for option in example.options}
        for word, owner in enumerate(question.owners if question else ()):
            assert question is not None
            labels = self.encode(question.conversation(word), question.tools).labels
            ids = [int(one) for one in labels if one >= 0 and int(one) not in self.control]
            found[example.options[owner]].append(ids)
        return found


def soft_options(head: Any, tokens: WordTokens, solved: InStates, asked: InStates) -> tuple[list[str], list[str]]:
    """Returns the option that scores highest for every row that is asked, and what was learned, in sentences.

    Args:
        head: Output layer of the language model.
        tokens: Of label words.
        solved: Training rows; each answers with one of its options.
        asked: Rows that all have options, of sources that have training rows with each of them.
    """
    chosen = [""] * len(asked.examples)
    said = []
    for source, places in _by_source(asked.examples).items():
        rows = [asked.examples[at] for at in places]
        known = _by_source(solved.examples)[source]
        found, options = _verbalizer(head, tokens, rows, [solved.examples[at] for at in known], solved.states[known])
        scores_RL = np.where(_open(rows, options), found.scores(asked.states[places]), -np.inf)
        for at, best in zip(places, scores_RL.argmax(1), strict=True):
            chosen[at] = options[best]
        counts = Counter(answer_of(solved.examples[at]) for at in known)
        alone = [option for option in options if counts[option] == 1]
        said.append(f"soft verbalizer of {source}, from {len(known):,} training rows: {_said(found, alone)}")
    return chosen, said


def _verbalizer(
    head: Any, tokens: WordTokens, asked: Sequence[Example], solved: Sequence[Example], states_RH: NDArray[np.float32]
) -> tuple[SoftVerbalizer, list[str]]:
    """Returns what scores the options of a source, and these in its order."""
    ids: dict[str, list[list[int]]] = {}
    for example in asked:
        if any(option not in ids for option in example.options):
            ids = {**tokens.of(example), **ids}
    options = list(ids)
    places = {option: at for at, option in enumerate(options)}
    owners_R = np.array([places[answer_of(example)] for example in solved])
    rows = Labelled(states_RH.astype(np.float64), owners_R, _open(solved, options))
    return learned(start_of(head.weight, getattr(head, "bias", None), list(ids.values())), rows), options


def _open(rows: Sequence[Example], options: Sequence[str]) -> NDArray[np.bool_]:
    """Returns ``(R, L)`` whether each row has each option."""
    return np.array([[option in set(example.options) for option in options] for example in rows], bool)


def _by_source(examples: Sequence[Example]) -> Mapping[str, list[int]]:
    found: dict[str, list[int]] = {}
    for at, example in enumerate(examples):
        found.setdefault(example.source, []).append(at)
    return found


def _said(found: SoftVerbalizer, alone: Sequence[str]) -> str:
    """Returns what was learned.

    Args:
        found: The verbalizer.
        alone: Options of one training row.
    """
    named = ", ".join(alone[:_NAMED]) + (f" and {len(alone) - _NAMED:,} more" if len(alone) > _NAMED else "")
    apart = f"; of {named} no row was held out, as there is one alone" if alone else ""
    away = f"its vectors may leave their label words with strength {found.strength:g} (0: not at all)"
    if not found.losses:
        return f"{away}, unjudged, as fewer than two labels have two rows"
    words, best = found.losses[0.0], found.losses[found.strength]
    if not found.strength:
        return f"nothing beyond the label words, which do best on rows held out ({words:.3f} nats){apart}"
    return f"{away}; {best:.3f} nats on rows held out, the label words alone {words:.3f}{apart}"
