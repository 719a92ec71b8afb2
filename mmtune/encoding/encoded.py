"""What became of all rows that were encoded: counts for the manifest and for what is said."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from mmtune.encoding.groups import EncodedGroups

LEFT_OUT = ("exemplars_dropped", "rows_with_fewer", "contexts_shortened")
"""What may be left out of rows, see ``EncodedGroups``."""


@dataclass
class Encoded:
    """What became of the rows of all splits so far.

    Attributes:
        trees: Split to its trees.
        examples: Split to its rows in them.
        tokens: Of all trees.
        tokens_apart: Of all rows, were nothing shared.
        counts: What was left out of them, see ``EncodedGroups``.
        notes: What there is to say of the counts of media tokens, once each.
    """

    trees: dict[str, int] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    tokens_apart: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    notes: dict[str, None] = field(default_factory=dict)

    def add(self, split: str, done: EncodedGroups) -> None:
        """Adds some groups of a split."""
        self.examples[split] += done.rows
        self.tokens += done.tokens
        self.tokens_apart += done.apart
        self.counts.update(done.counts)
        self.notes.update(dict.fromkeys(done.notes))

    def facts(self) -> dict[str, Any]:
        """Returns what the manifest says of it."""
        totals = {"tokens": self.tokens, "tokens_apart": self.tokens_apart}
        left_out = {name: self.counts[name] for name in (*LEFT_OUT, *self.counts)}
        return {"examples": self.examples, "notes": list(self.notes), **totals, **left_out}
