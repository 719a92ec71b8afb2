"""Models asked every row, one after the other: answers, and losses on the reference answers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from mmtune.encoding.collate import Collator
from mmtune.encoding.processor import pad_token_id, tokenizer_of
from mmtune.evaluation.damage import refuse_nan
from mmtune.evaluation.generation import generate_texts, stop_ids
from mmtune.evaluation.options import by_media, score_words
from mmtune.evaluation.pairs import answerer
from mmtune.evaluation.prototypes import SolvedRows, nearest_option, prompt_states, prototypes
from mmtune.evaluation.ranking import Question, Shares, Words, shares
from mmtune.evaluation.rows import EvalRows
from mmtune.evaluation.scoring import RowScorer
from mmtune.evaluation.soft_options import InStates, WordTokens, soft_options

CACHE_BYTES = 256 << 20
"""Most bytes of media kept between batches."""
_STOP_ROWS = 32
"""So many trained answers are looked at for the token that ends them."""


Losses = tuple[np.ndarray, np.ndarray]
"""``(nll, tokens)`` of every row."""


class _Unseen:
    """A bar that nobody sees."""

    def advance(self, count: int = 1) -> None:
        """Counts nothing."""


@dataclass(frozen=True, slots=True)
class Asking:
    """How rows are asked.

    Attributes:
        media_root: Folder that media paths are relative to.
        batch_rows: Rows per batch.
        max_new_tokens: Longest answer.
        loss: Also measure the loss on the reference answers.
        rank: Answer rows with options by their likeliest option.
        words: Label words by source, for ranking.
        solved: Answer rows with options by what these rows leave in the model; None answers them otherwise.
        learned: Told what was learned of ``solved``, for the report.
        should_stop: Asked between batches; true ends it with ``generation.Stopped``.
        progress: Total and label to a context with an ``advance``; by default nothing is shown.
        note: Told what a person should know.
        missing: Modalities whose tokens nobody sees, of a model that takes them for missing then.
    """

    media_root: Path
    batch_rows: int
    max_new_tokens: int
    loss: bool
    rank: bool
    words: Words
    should_stop: Callable[[], bool]
    progress: Callable[[int, str], AbstractContextManager[Any]] = lambda total, label: nullcontext(_Unseen())
    note: Callable[[str], None] = lambda text: None
    missing: tuple[str, ...] = ()
    solved: SolvedRows | None = None
    learned: Callable[[str], None] = lambda text: None

    def collator(self, processor: Any, *, left: bool = False) -> Collator:
        """Returns what makes batches of rows."""
        made = Collator(processor, media_root=self.media_root, left=left, cache_bytes=CACHE_BYTES)
        return made.without(self.missing) if self.missing else made


@dataclass(frozen=True, slots=True)
class Heard:
    """What models answered, by model and way.

    Attributes:
        texts: Answers to the kept rows of the way.
        losses: On the references, where they were asked for.
        shares: Log-probabilities of the options of ranked rows.
    """

    texts: dict[str, list[str]]
    losses: dict[str, Losses]
    shares: dict[str, Shares]


class Answering:
    """A loaded model that answers rows, with what stays between one set of rows and the next.

    Media, and the beginnings that rows share, are kept; what ends a trained answer is looked up once.

    Args:
        model: It.
        processor: Its processor.
        asking: How rows are asked.

    Attributes:
        scorer: Gives log-probabilities of options and answers; beginnings that rows share run once.
    """

    def __init__(self, model: Any, processor: Any, asking: Asking) -> None:
        self._model, self._processor, self._asking = model, processor, asking
        self._left = asking.collator(processor, left=True)
        self._stops: list[int] | None = None
        self.scorer = RowScorer(
            model,
            asking.collator(processor),
            batch_rows=asking.batch_rows,
            should_stop=asking.should_stop,
            note=asking.note,
        )

    def answers(self, rows: EvalRows, name: str = "", words: Words | None = None) -> list[str]:
        """Returns the answers to kept rows: the likeliest option where they are ranked, or the model's own words.

        Args:
            rows: Already examined.
            name: Of the model, for the progress bar.
            words: Label words in place of those of ``asking``.

        Raises:
            Stopped: ``should_stop`` said so.
        """
        return self.answers_and_shares(rows, name, words)[0]

    def answers_and_shares(
        self, rows: EvalRows, name: str = "", words: Words | None = None
    ) -> tuple[list[str], Shares]:
        """Returns the answers as ``answers`` does, and the log-probabilities of the options where rows are ranked."""
        words, found = self._asking.words if words is None else words, Shares()
        if self._asking.rank:
            found = self._ranked(rows, name, words)
            chosen = {row: rows.example(row).options[int(own.argmax())] for row, own in found.items()}
        else:
            chosen = self._by_states(rows, name, words)
        free = [row for row in range(len(rows.kept)) if row not in chosen]
        said = dict(zip(free, self._generated(rows, name, free), strict=True))
        return [chosen[row] if row in chosen else said[row] for row in range(len(rows.kept))], found

    def losses(self, rows: EvalRows, name: str = "") -> Losses:
        """Returns the losses on the reference answers of the kept rows; arguments as in ``answers``."""
        order = by_media([rows.example(row).media for row in range(len(rows.kept))])
        with self._asking.progress(len(rows.kept), f"eval {name} loss") as bar:
            logprob, tokens = self.scorer(rows.conversations, order, bar.advance)
        refuse_nan(name, "probabilities", logprob)
        return -logprob, tokens

    def _ranked(self, rows: EvalRows, name: str, words: Words) -> Shares:
        """Returns the log-probabilities of the options of every row that has some."""

        def score(asked: Sequence[tuple[Question, int]]) -> np.ndarray:
            with self._asking.progress(len(asked), f"eval {name} options") as bar:
                found = score_words(self.scorer, rows.encode, asked, bar.advance)
            refuse_nan(name, "probabilities", found)
            return found

        examples = {row: example for row in range(len(rows.kept)) if (example := rows.example(row)).options}
        return shares(examples, words, score)

    def _by_states(self, rows: EvalRows, name: str, words: Words) -> dict[int, str]:
        """Returns the option of every row that has some, by the states in which training rows leave the model."""
        solved = self._asking.solved
        if solved is None:
            return {}
        shown = solved.rows.for_model(self._model)
        known = self._states(shown, f"{name} training rows", range(len(shown.kept)))
        examples = {row: example for row in range(len(rows.kept)) if (example := rows.example(row)).options}
        states = self._states(rows, f"{name} states", list(examples))
        if solved.soft:
            given = InStates([shown.example(row) for row in range(len(shown.kept))], known)
            return self._soft(name, given, InStates(list(examples.values()), states), list(examples), rows, words)
        means = prototypes(known, solved.labels)
        found = {
            row: nearest_option(state, example.source, example.options, means)
            for (row, example), state in zip(examples.items(), states, strict=True)
        }
        return {row: option for row, option in found.items() if option is not None}

    def _soft(
        self, name: str, solved: InStates, asked: InStates, numbers: Sequence[int], rows: EvalRows, words: Words
    ) -> dict[int, str]:
        """Returns the option of every row that is asked, by what is learned from the training rows."""
        control = frozenset(getattr(tokenizer_of(self._processor), "added_tokens_decoder", {}))
        bare = self._model.get_base_model() if hasattr(self._model, "peft_config") else self._model
        tokens = WordTokens(words, rows.encode, control)
        chosen, said = soft_options(bare.get_output_embeddings(), tokens, solved, asked)
        for line in said:
            self._asking.learned(f"{name}: {line}")
        return dict(zip(numbers, chosen, strict=True))

    def _states(self, rows: EvalRows, label: str, chosen: Sequence[int]) -> np.ndarray:
        with self._asking.progress(len(chosen), f"eval {label}") as bar:
            states = prompt_states(
                self._model,
                lambda numbers: rows.prompts([chosen[at] for at in numbers]),
                self._asking.collator(self._processor),
                sizes=[rows.prompt_sizes[row] for row in chosen],
                batch_rows=self._asking.batch_rows,
                should_stop=self._asking.should_stop,
                advance=bar.advance,
            )
        # What overflowed is no place to measure from either.
        refuse_nan(label.partition(" ")[0].rstrip(","), "states", np.where(np.isinf(states), np.nan, states))
        return states

    def _generated(self, rows: EvalRows, name: str, chosen: Sequence[int]) -> list[str]:
        if not chosen:
            return []
        tokenizer = tokenizer_of(self._processor)
        if self._stops is None:
            some = rows.conversations(range(min(_STOP_ROWS, len(rows.kept))))
            self._stops = stop_ids(self._model, tokenizer, some)
        with self._asking.progress(len(chosen), f"eval {name}") as bar:
            return generate_texts(
                self._model,
                tokenizer,
                lambda numbers: rows.prompts([chosen[at] for at in numbers]),
                self._left,
                sizes=[rows.prompt_sizes[row] for row in chosen],
                stops=self._stops,
                pad_id=pad_token_id(self._processor),
                max_new_tokens=self._asking.max_new_tokens,
                batch_rows=self._asking.batch_rows,
                should_stop=self._asking.should_stop,
                advance=bar.advance,
                look=partial(refuse_nan, name, "probabilities"),
            )


def ask_each(
    models: Mapping[str, Callable[[], Any]],
    processor: Any,
    ways: Mapping[str, EvalRows],
    asking: Asking,
    also: Callable[[str, Any], None] = lambda name, model: None,
    further: Mapping[str, EvalRows] = MappingProxyType({}),
) -> Heard:
    """Returns every model's answers to the kept rows, and its losses when they are asked for, by model and way.

    Args:
        models: Name to what loads the model; one is in memory at a time.
        processor: Their processor.
        ways: Way of asking to the same rows in it, already examined; the empty one names no way.
        asking: How they are asked.
        also: Told of each model while it is in memory.
        further: Further ways, of which no loss is wanted.

    Raises:
        Stopped: ``should_stop`` said so.
    """
    heard = Heard({}, {}, {})
    for name, load in models.items():
        model = load()
        answering = Answering(model, processor, asking)
        for way, rows in (*ways.items(), *further.items()):
            label = answerer(name, way)
            shown = rows.for_model(model)
            heard.texts[label], heard.shares[label] = answering.answers_and_shares(shown, label)
            if asking.loss and way in ways:
                heard.losses[label] = answering.losses(shown, label)
        also(name, model)
        del model, answering
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return heard
