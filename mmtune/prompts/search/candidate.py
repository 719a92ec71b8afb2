"""A prompt that a search tries: instruction, exemplars, words of the labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol


class Scorable(Protocol):
    """What a search scores: a ``Candidate``, or a vector of soft tokens with the same two faces."""

    @property
    def key(self) -> str:
        """Equal for equal prompts, also in another process."""

    def facts(self) -> dict[str, Any]:
        """What the trace says of it, as JSON."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One prompt.

    Attributes:
        instruction: Template text; ``{prompt}`` is what the row's own template says, other slots are parts of it.
        exemplars: Ids of the training rows that are shown solved, the first shown first.
        verbalizer: Number of the words for the labels; 0 leaves the labels as they are.
    """

    instruction: str
    exemplars: tuple[str, ...] = ()
    verbalizer: int = 0

    @property
    def key(self) -> str:
        """Returns a short hash, equal for equal candidates on every machine."""
        text = json.dumps([self.instruction, list(self.exemplars), self.verbalizer], ensure_ascii=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def facts(self) -> dict[str, Any]:
        """Returns the candidate as JSON."""
        return {**asdict(self), "exemplars": list(self.exemplars)}


def candidate_of(facts: Mapping[str, Any]) -> Candidate:
    """Returns the candidate that ``facts`` were made from."""
    return Candidate(facts["instruction"], tuple(facts["exemplars"]), facts["verbalizer"])
