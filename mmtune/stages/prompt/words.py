"""What a prompt of method rl is made of: words of the recipe or pieces of the tokenizer, with their embeddings."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from mmtune.encoding.processor import tokenizer_of
from mmtune.errors import RecipeError
from mmtune.models.soft_prompt import word_vectors
from mmtune.prompts.search.rl import RlSettings
from mmtune.recipe import Rl

_LEAST = 2


def rl_settings(own: Rl, processor: Any, model: Any, answers: Collection[str]) -> RlSettings:
    """Returns the words of a search and how its policy learns.

    Args:
        own: ``prompt.rl``.
        processor: Of the model; its tokenizer says what can be said.
        model: The frozen model, whose embeddings tell words apart.
        answers: Answers of the rows; a prompt that says one would ask for it, so that they are left out.

    Raises:
        RecipeError: Fewer than two words are left.
    """
    tokenizer = tokenizer_of(processor)
    left_out = {answer.strip().casefold() for answer in answers}
    ids_of = _pieces(tokenizer) if own.words == "pieces" else _spelled(tokenizer, own.words)
    kept = {word: ids for word, ids in ids_of.items() if word.strip().casefold() not in left_out}
    if len(kept) < _LEAST:
        raise RecipeError(
            f"prompt.rl.words leaves {len(kept)} words to search; answers of the rows are no words of a prompt",
            "name more words, or take words: pieces",
            "few_words",
        )
    words, rows = tuple(kept), list(kept.values())
    vectors_VH = word_vectors(model).numpy()

    def say(numbers: Sequence[int]) -> str:
        if own.words == "pieces":
            text = tokenizer.decode([at for number in numbers for at in rows[number]]).strip()
        else:
            text = " ".join(words[number] for number in numbers)
        # Pieces may spell an answer that no piece is.
        return text if _can_say(tokenizer, text) and not names_one(text, left_out) else ""

    return RlSettings(
        words=words,
        embedding_VD=np.stack([vectors_VH[ids].mean(0) for ids in rows]),
        say=say,
        length=own.length,
        top_k=own.top_k,
        hidden=own.hidden,
        rate=own.learning_rate,
        entropy=own.entropy,
    )


def names_one(text: str, answers: Collection[str]) -> bool:
    """Says whether a text names one of the answers, in words of its own and in any case."""
    folded = text.casefold()
    return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", folded) for answer in answers if answer)


def _spelled(tokenizer: Any, words: Sequence[str]) -> dict[str, list[int]]:
    spelled = {word: tokenizer.encode(f" {word}", add_special_tokens=False) for word in words}
    return {word: ids for word, ids in spelled.items() if ids}


def _pieces(tokenizer: Any) -> dict[str, list[int]]:
    """Returns every piece of the vocabulary that is printable text with a letter in it, the first of equals."""
    special = set(tokenizer.all_special_ids)
    found: dict[str, list[int]] = {}
    for number in range(len(tokenizer)):
        text = tokenizer.decode([number])
        if number not in special and text.isprintable() and any(letter.isalpha() for letter in text):
            found.setdefault(text, [number])
    return found


def _can_say(tokenizer: Any, text: str) -> bool:
    """Says whether the tokenizer gives a text back as it was."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return tokenizer.unk_token_id not in ids and back.strip() == text.strip()
