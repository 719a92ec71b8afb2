"""The proposer that asks a chat model; every answer goes through the trace, so that a search can be replayed."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mmtune.prompts.search.candidate import Candidate
from mmtune.prompts.search.edits import Edits
from mmtune.prompts.search.proposer import Mistake, Solved
from mmtune.prompts.search.scorer import Scored
from mmtune.prompts.search.space import Space, slot, slots_of
from mmtune.prompts.search.trace import Trace

_MARKED = re.compile(r"<PROMPT>\s*(.*?)\s*</PROMPT>", re.DOTALL)
_SHOWN = 5
_MOST_CHARS = 20_000

_TASK = """You write instructions for a language model that answers questions about inputs.
An instruction is text with slots in braces; each slot is replaced by a part of the input. It must have the slots
{kept} exactly as written here, each once. It may also use {spare}. It is shorter than {longest} characters.
Inputs with right answers:

{examples}
"""
_FORM = "Write one instruction, between <PROMPT> and </PROMPT>, and nothing else."


@dataclass(frozen=True)
class ChatProposer:
    """Proposes prompts by a chat model; exemplars and label words by rule.

    Attributes:
        space: What may change.
        solved: Rows that the model is shown.
        ask: A question to the model's answer.
        trace: Keeps the answers.
    """

    space: Space
    solved: tuple[Solved, ...]
    ask: Callable[[str], str]
    trace: Trace

    def first(self, count: int, dice: random.Random) -> list[Candidate]:
        """Returns instructions induced from other rows each time."""
        return self._asked(count, dice, lambda: "The instruction that would lead to these answers was:")

    def near(self, candidate: Candidate, count: int, dice: random.Random) -> list[Candidate]:
        """Returns variations that keep the meaning."""
        said = "Write a variation of this instruction that means the same:\n" + _quoted(candidate)
        return self._asked(count, dice, lambda: said, candidate)

    def after(self, history: Sequence[Scored], count: int, dice: random.Random) -> list[Candidate]:
        """Returns instructions that should score higher than the history."""
        tried = "\n".join(f"{_quoted(one.candidate)}\nscore: {100 * one.score:.1f}" for one in history)
        said = f"Instructions and their scores, the best last:\n{tried}\nWrite a new one that scores higher."
        return self._asked(count, dice, lambda: said, history[-1].candidate if history else None)

    def mended(
        self, candidate: Candidate, mistakes: Sequence[Mistake], count: int, dice: random.Random
    ) -> list[Candidate]:
        """Returns instructions written after a look at mistakes."""
        lines = [
            f"input: {one.row.asked}\nright answer: {one.row.answer}"
            + (f"\nit answered: {one.said}" if one.said else "")
            for one in mistakes
        ]
        said = f"This instruction:\n{_quoted(candidate)}\nled to mistakes:\n" + "\n\n".join(lines)
        return self._asked(count, dice, lambda: f"{said}\nWrite an instruction that avoids them.", candidate)

    def _asked(
        self, count: int, dice: random.Random, body: Callable[[], str], parent: Candidate | None = None
    ) -> list[Candidate]:
        if "instruction" not in self.space.vary:
            return Edits(self.space, self.solved).near(parent or self.space.start, count, dice)
        out = []
        for _ in range(count):
            text = self._text(f"{self._task(dice)}\n{body()}\n{_FORM}")
            if parent is None:
                out.append(self.space.draw(text, dice))
                continue
            others = self.space.vary - {"instruction"}
            if others and dice.random() < 0.5:
                parent = Edits(replace(self.space, vary=others), self.solved).near(parent, 1, dice)[0]
            out.append(replace(parent, instruction=text))
        return out

    def _task(self, dice: random.Random) -> str:
        shown = dice.sample(self.solved, min(_SHOWN, len(self.solved)))
        examples = "\n\n".join(f"input: {one.asked}\nanswer: {one.answer}" for one in shown)
        kept = slots_of(self.space.start.instruction)
        return _TASK.format(
            kept=", ".join(map(slot, sorted(kept))) or "(none)",
            spare=", ".join(map(slot, sorted(self.space.slots - kept))) or "(no other)",
            longest=self.space.longest,
            examples=examples,
        )

    def _text(self, question: str) -> str:
        key = hashlib.blake2b(question.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        said = self.trace.step("proposal", key, lambda: {"text": self.ask(question)[:_MOST_CHARS]})["text"]
        found = _MARKED.search(said)
        return found.group(1) if found else said.strip()


def _quoted(candidate: Candidate) -> str:
    return f"<PROMPT>{candidate.instruction}</PROMPT>"
