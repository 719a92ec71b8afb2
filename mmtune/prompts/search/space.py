"""What a search may change, and what a proposed prompt must keep."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from mmtune.prompts.search.candidate import Candidate

_SLOT = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_BRACE = re.compile(r"\{\{|\}\}|\{[A-Za-z_][A-Za-z0-9_]*\}")


def slot(name: str) -> str:
    """Returns a name in braces, as an instruction has it."""
    return "{" + name + "}"


def slots_of(instruction: str) -> frozenset[str]:
    """Returns the names in braces of an instruction."""
    return frozenset(_SLOT.findall(instruction.replace("{{", "").replace("}}", "")))


@dataclass(frozen=True, slots=True)
class Space:
    """The prompts that a search may try.

    Attributes:
        start: Where it starts; the slots of its instruction stay in every prompt.
        vary: Parts that change: ``instruction``, ``exemplars``, ``verbalizer``.
        exemplars: Ids of the rows that may be shown.
        shots: Most rows that are shown.
        verbalizers: Number of choices, the labels as they are included.
        slots: Names that an instruction may use: every dev row has them.
        longest: Longest instruction in characters.
    """

    start: Candidate
    vary: frozenset[str] = frozenset({"instruction"})
    exemplars: tuple[str, ...] = ()
    shots: int = 0
    verbalizers: int = 1
    slots: frozenset[str] = frozenset({"prompt"})
    longest: int = 600

    def fault(self, candidate: Candidate) -> str:
        """Returns why a prompt is not in this space, as a reason code, or an empty string."""
        text = candidate.instruction
        if not text.strip():
            return "empty"
        if len(text) > self.longest:
            return "too_long"
        bare = _BRACE.sub("", text)
        if "{" in bare or "}" in bare or "\0" in text:
            return "stray_brace"
        named = slots_of(text)
        if not slots_of(self.start.instruction) <= named:
            return "slot_lost"
        if not named <= self.slots:
            return "unknown_slot"
        if any(text.count(slot(name)) > 1 for name in named):
            return "slot_repeated"
        if len(candidate.exemplars) > self.shots or len(set(candidate.exemplars)) != len(candidate.exemplars):
            return "bad_exemplars"
        if not set(candidate.exemplars) <= set(self.exemplars):
            return "unknown_exemplar"
        if not 0 <= candidate.verbalizer < max(self.verbalizers, 1):
            return "unknown_verbalizer"
        return ""

    def draw_exemplars(self, dice: random.Random) -> tuple[str, ...]:
        """Returns a random ordered choice of up to ``shots`` rows."""
        count = dice.randint(0, min(self.shots, len(self.exemplars)))
        return tuple(dice.sample(self.exemplars, count))

    def draw(self, instruction: str, dice: random.Random) -> Candidate:
        """Returns an instruction with the other parts drawn at random, those that change."""
        return replace(
            self.start,
            instruction=instruction if "instruction" in self.vary else self.start.instruction,
            exemplars=self.draw_exemplars(dice) if "exemplars" in self.vary else self.start.exemplars,
            verbalizer=dice.randrange(self.verbalizers) if "verbalizer" in self.vary else self.start.verbalizer,
        )


@dataclass
class Admission:
    """Lets proposed prompts in once each, and counts what it refuses.

    Attributes:
        space: What a prompt must be.
        refused: Reason code to number: ``duplicate``, ``empty``, ``too_long``, ``slot_lost``, ...
    """

    space: Space
    refused: Counter[str] = field(default_factory=Counter)
    _seen: set[str] = field(default_factory=set)

    def __call__(self, proposed: Iterable[Candidate]) -> list[Candidate]:
        """Returns the prompts that are in the space and were not let in before, in order."""
        fresh = []
        for candidate in proposed:
            reason = self.space.fault(candidate) or ("duplicate" if candidate.key in self._seen else "")
            if reason:
                self.refused[reason] += 1
                continue
            self._seen.add(candidate.key)
            fresh.append(candidate)
        return fresh
