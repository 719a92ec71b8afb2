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
from mmtune.evaluation.generation import answer_losses, generate_texts, stop_ids
from mmtune.evaluation.ranking import Question, Words, rank
from mmtune.evaluation.rows import EvalRows

_CACHE_BYTES = 256 << 20
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
    """

    media_root: Path
    batch_rows: int
    max_new_tokens: int
    loss: bool
    rank: bool
    words: Words
    should_stop: Callable[[], bool]
    progress: Callable[[int, str], AbstractContextManager[Any]]


def ask_each(
    models: Mapping[str, Callable[[], Any]], processor: Any, rows: EvalRows, asking: Asking
) -> tuple[dict[str, list[str]], dict[str, Losses]]:
    """Returns every model's answers to the kept rows, and its losses when they are asked for.

    Args:
        models: Name to what loads the model; one is in memory at a time.
        processor: Their processor.
        rows: Already examined.
        asking: How they are asked.

    Raises:
        Stopped: ``should_stop`` said so.
    """
    texts: dict[str, list[str]] = {}
    losses: dict[str, Losses] = {}
    for name, load in models.items():
        model = load()
        texts[name] = answers_of(name, model, processor, rows, asking)
        if asking.loss:
            losses[name] = _losses(name, model, processor, rows, asking)
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return texts, losses


def answers_of(name: str, model: Any, processor: Any, rows: EvalRows, asking: Asking) -> list[str]:
    """Returns one model's answers to the kept rows.

    Args:
        name: Of the model, for the progress bar.
        model: It.
        processor: Its processor.
        rows: Already examined.
        asking: How they are asked.

    Raises:
        Stopped: ``should_stop`` said so.
    """
    ranked = _ranked(name, model, processor, rows, asking) if asking.rank else {}
    free = [row for row in range(len(rows.kept)) if row not in ranked]
    said = dict(zip(free, _generated(name, model, processor, rows, asking, free), strict=True))
    return [ranked[row] if row in ranked else said[row] for row in range(len(rows.kept))]


def _ranked(name: str, model: Any, processor: Any, rows: EvalRows, asking: Asking) -> dict[int, str]:
    """Returns the likeliest option of every row that has options."""

    def score(asked: Sequence[tuple[Question, int]]) -> np.ndarray:
        with asking.progress(len(asked), f"eval {name} options") as bar:
            nll, _ = answer_losses(
                model,
                lambda chosen: [
                    rows.encode(asked[at][0].conversation(asked[at][1]), asked[at][0].tools) for at in chosen
                ],
                Collator(processor, media_root=asking.media_root, cache_bytes=_CACHE_BYTES),
                sizes=[rows.row_sizes[question.row] for question, _ in asked],
                batch_rows=asking.batch_rows,
                should_stop=asking.should_stop,
                advance=bar.advance,
            )
        return -nll

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
            Collator(processor, media_root=asking.media_root, left=True, cache_bytes=_CACHE_BYTES),
            sizes=[rows.prompt_sizes[row] for row in chosen],
            stops=stop_ids(model, tokenizer, rows.conversations(range(min(_STOP_ROWS, len(rows.kept))))),
            pad_id=pad_token_id(processor),
            max_new_tokens=asking.max_new_tokens,
            batch_rows=asking.batch_rows,
            should_stop=asking.should_stop,
            advance=bar.advance,
        )


def _losses(name: str, model: Any, processor: Any, rows: EvalRows, asking: Asking) -> Losses:
    with asking.progress(len(rows.kept), f"eval {name} loss") as bar:
        return answer_losses(
            model,
            rows.conversations,
            Collator(processor, media_root=asking.media_root, cache_bytes=_CACHE_BYTES),
            sizes=rows.row_sizes,
            batch_rows=asking.batch_rows,
            should_stop=asking.should_stop,
            advance=bar.advance,
        )
