"""Models asked every row, one after the other: answers, and losses on the reference answers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtune.encoding.collate import Collator
from mmtune.encoding.processor import pad_token_id, tokenizer_of
from mmtune.evaluation.generation import generate_texts, stop_ids
from mmtune.evaluation.options import by_media, score_words
from mmtune.evaluation.ranking import Question, Words, rank
from mmtune.evaluation.rows import EvalRows
from mmtune.evaluation.scoring import RowScorer

CACHE_BYTES = 256 << 20
"""Most bytes of media kept between batches."""
_STOP_ROWS = 32
"""So many trained answers are looked at for the token that ends them."""


Losses = tuple[np.ndarray, np.ndarray]
"""``(nll, tokens)`` of every row."""


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
        should_stop: Asked between batches; true ends it with ``generation.Stopped``.
        progress: Total and label to a context with an ``advance``.
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
    progress: Callable[[int, str], AbstractContextManager[Any]]
    note: Callable[[str], None] = lambda text: None
    missing: tuple[str, ...] = ()

    def collator(self, processor: Any, *, left: bool = False) -> Collator:
        """Returns what makes batches of rows."""
        made = Collator(processor, media_root=self.media_root, left=left, cache_bytes=CACHE_BYTES)
        return made.without(self.missing) if self.missing else made


def answerer(model: str, way: str) -> str:
    """Returns the name of a model asked in a way, as the report has it; an empty way names none."""
    return f"{model}, {way}" if way else model


def ask_each(
    models: Mapping[str, Callable[[], Any]],
    processor: Any,
    ways: Mapping[str, EvalRows],
    asking: Asking,
    also: Callable[[str, Any], None] = lambda name, model: None,
) -> tuple[dict[str, list[str]], dict[str, Losses]]:
    """Returns every model's answers to the kept rows, and its losses when they are asked for, by model and way.

    Args:
        models: Name to what loads the model; one is in memory at a time.
        processor: Their processor.
        ways: Way of asking to the same rows in it, already examined; the empty one names no way.
        asking: How they are asked.
        also: Told of each model while it is in memory.

    Raises:
        Stopped: ``should_stop`` said so.
    """
    texts: dict[str, list[str]] = {}
    losses: dict[str, Losses] = {}
    for name, load in models.items():
        model = load()
        scorer = _scorer(model, processor, asking)
        for way, rows in ways.items():
            label = answerer(name, way)
            shown = rows.for_model(model)
            texts[label] = answers_of(label, model, processor, shown, asking, scorer)
            if asking.loss:
                losses[label] = losses_of(label, model, processor, shown, asking, scorer)
        also(name, model)
        del model, scorer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return texts, losses


def _scorer(model: Any, processor: Any, asking: Asking) -> RowScorer:
    collate = asking.collator(processor)
    return RowScorer(model, collate, batch_rows=asking.batch_rows, should_stop=asking.should_stop, note=asking.note)


def answers_of(
    name: str, model: Any, processor: Any, rows: EvalRows, asking: Asking, scorer: RowScorer | None = None
) -> list[str]:
    """Returns one model's answers to the kept rows.

    Args:
        name: Of the model, for the progress bar.
        model: It.
        processor: Its processor.
        rows: Already examined.
        asking: How they are asked.
        scorer: Of the model's options; made where it is None.

    Raises:
        Stopped: ``should_stop`` said so.
    """
    ranked = _ranked(name, scorer or _scorer(model, processor, asking), rows, asking) if asking.rank else {}
    free = [row for row in range(len(rows.kept)) if row not in ranked]
    said = dict(zip(free, _generated(name, model, processor, rows, asking, free), strict=True))
    return [ranked[row] if row in ranked else said[row] for row in range(len(rows.kept))]


def _ranked(name: str, scorer: RowScorer, rows: EvalRows, asking: Asking) -> dict[int, str]:
    """Returns the likeliest option of every row that has options."""

    def score(asked: Sequence[tuple[Question, int]]) -> np.ndarray:
        with asking.progress(len(asked), f"eval {name} options") as bar:
            return score_words(scorer, rows.encode, asked, bar.advance)

    examples = {row: example for row in range(len(rows.kept)) if (example := rows.example(row)).options}
    return rank(examples, asking.words, score)


def _generated(
    name: str, model: Any, processor: Any, rows: EvalRows, asking: Asking, chosen: Sequence[int]
) -> list[str]:
    if not chosen:
        return []
    tokenizer = tokenizer_of(processor)
    with asking.progress(len(chosen), f"eval {name}") as bar:
        return generate_texts(
            model,
            tokenizer,
            lambda numbers: rows.prompts([chosen[at] for at in numbers]),
            asking.collator(processor, left=True),
            sizes=[rows.prompt_sizes[row] for row in chosen],
            stops=stop_ids(model, tokenizer, rows.conversations(range(min(_STOP_ROWS, len(rows.kept))))),
            pad_id=pad_token_id(processor),
            max_new_tokens=asking.max_new_tokens,
            batch_rows=asking.batch_rows,
            should_stop=asking.should_stop,
            advance=bar.advance,
        )


def losses_of(
    name: str, model: Any, processor: Any, rows: EvalRows, asking: Asking, scorer: RowScorer | None = None
) -> Losses:
    """Returns a model's losses on the reference answers of the kept rows; arguments as in ``answers_of``."""
    scorer = scorer or _scorer(model, processor, asking)
    order = by_media([rows.example(row).media for row in range(len(rows.kept))])
    with asking.progress(len(rows.kept), f"eval {name} loss") as bar:
        logprob, tokens = scorer(rows.conversations, order, bar.advance)
    return -logprob, tokens
