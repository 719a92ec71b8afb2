"""Labels in words: what a source's labels are called in questions and answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mmtune.errors import RecipeError
from mmtune.records import Record, Reject

Verbalizer = Mapping[str, tuple[str, ...]]
"""Label to its words; the first is taught and listed, all count when options are ranked."""


def check_verbalizer(source: str, words: Verbalizer) -> None:
    """Raises RecipeError unless every label has words of its own."""
    owner: dict[str, str] = {}
    for label, own in words.items():
        if not own or any(not word.strip() for word in own):
            raise RecipeError(f"source {source!r}: verbalizer has no word for {label!r}", "give one", "bad_verbalizer")
        for word in own:
            if owner.setdefault(word.strip(), label) != label:
                raise RecipeError(
                    f"source {source!r}: the word {word!r} stands for {owner[word.strip()]!r} and for {label!r}",
                    "give every label words of its own",
                    "bad_verbalizer",
                )


def verbalized(record: Record, words: Verbalizer) -> Record | Reject:
    """Returns a record whose labels are words, or the refusal of one whose label has none.

    Args:
        record: Its target, references and options are labels.
        words: Of its source.
    """
    unknown = next((label for label in (record.target, *record.references) if label and label not in words), None)
    if unknown is not None:
        known = ", ".join(words)
        return Reject(record.where, record.id, "unknown_label", f"verbalizer has no label {unknown!r}; it has {known}")
    return replace(
        record,
        target=words[record.target][0] if record.target else "",
        references=tuple(dict.fromkeys(word for label in record.references for word in words[label])),
        options=tuple(own[0] for own in words.values()),
    )
