"""What virtual tokens start from: a text, or the labels of the training rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from mmtune.errors import DataError
from mmtune.recipe import SoftPrompt
from mmtune.storage import open_split


def start_of(prompt: SoftPrompt, tokenizer: Any, run_dir: Path) -> dict[str, Any]:
    """Returns the arguments of ``add_soft_prompt`` that say what virtual tokens start from.

    Args:
        prompt: The recipe's section.
        tokenizer: Of the model.
        run_dir: Holds instructions/, for the labels.

    Raises:
        DataError: Labels are asked for, and the training rows have none.
    """

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    text_ids = ids(prompt.text) if prompt.init == "text" else []
    labels = labels_of(run_dir / "instructions" / "train") if prompt.init == "labels" else ()
    label_ids = [found for found in map(ids, labels) if found]
    return {"init": prompt.init, "text_ids": text_ids, "label_ids": label_ids, "encoder": prompt.encoder}


def labels_of(folder: Path) -> tuple[str, ...]:
    """Returns the labels of training rows, the most frequent first: their options, or answers where they have none.

    Args:
        folder: ``instructions/train``.

    Raises:
        DataError: No row has options, and no answer comes twice: what is taught is no class.
    """
    options, answers = Counter[str](), Counter[str]()
    for batch in open_split(folder).select(["options", "messages"]).to_batches():
        for row in batch.to_pylist():
            options.update(row["options"])
            last = row["messages"][-1]
            if not row["options"] and last["role"] == "assistant":
                answers["".join(part["text"] or "" for part in last["content"]).strip()] += 1
    if not options and max(answers.values(), default=0) < 2:
        raise DataError(
            "finetune.soft_prompt.init labels: no training row has options, and no answer comes twice",
            "set init to random, vocabulary or text",
            "no_labels",
        )
    return tuple(label for label, _ in (options + answers).most_common() if label)
