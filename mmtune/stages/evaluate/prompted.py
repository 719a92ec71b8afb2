"""eval.compare with best_prompt and tuned_best_prompt: the same rows asked with the prompt in prompt/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mmtune.errors import IntegrityError, RecipeError
from mmtune.evaluation.rows import question_of
from mmtune.media.content import names_beside
from mmtune.models.tuned_from import Base
from mmtune.prompts.searched import SOFT, SearchedPrompt, asked_with, moved, read_prompt
from mmtune.prompts.wordings import WORDINGS
from mmtune.recipe import Eval, Recipe
from mmtune.records import Example
from mmtune.storage import Manifest, read_manifest

_PROMPTED = "best_prompt"


def is_prompted(name: str) -> bool:
    """Says whether an answerer of ``eval.compare`` is asked with the searched prompt."""
    return name.endswith(_PROMPTED)


def prompt_of(
    recipe: Recipe, settings: Eval, instructions: Manifest, base: Base, adapter: Manifest | None
) -> Manifest | None:
    """Returns the manifest of prompt/, or None where nothing is asked with it.

    Args:
        recipe: Its ``run_dir`` holds prompt/.
        settings: Its eval part.
        instructions: The rows that are asked.
        base: The base model.
        adapter: The tuned model that is asked, if one is.

    Raises:
        DataError: It is not there.
        IntegrityError: It was searched on other rows, some of which may be held out now, or with another model or
            adapter.
        RecipeError: Its soft tokens stand before the base, and the tuned model is to be asked with them.
    """
    if not any(map(is_prompted, settings.compare)):
        return None
    found = read_manifest(recipe.run_dir / "prompt", made_by="prompt")
    if found.parents.get("instructions") != instructions.hash_without(WORDINGS):
        raise IntegrityError(
            "prompt/ was searched on other rows than instructions/ holds", "run: mmtune prompt", "other_rows"
        )
    if found.config["weights"] != base.weights:
        raise IntegrityError(
            f"prompt/ was searched with {found.facts['model']}, eval asks {base.path}, which is another model",
            "run: mmtune prompt",
            "other_model",
        )
    if adapter is not None and found.parents.get("adapter", adapter.hash) != adapter.hash:
        raise IntegrityError(
            "prompt/ was searched with another adapter than adapter/ holds", "run: mmtune prompt", "other_adapter"
        )
    if found.facts.get("soft") and "tuned_best_prompt" in settings.compare:
        raise RecipeError(
            "the prompt in prompt/ is soft tokens before the base; the tuned model cannot take them",
            "leave tuned_best_prompt out of eval.compare",
            "soft_before_tuned",
        )
    return found


def adapter_of(recipe: Recipe, name: str, prompt: Manifest | None) -> Path | None:
    """Returns the folder of the adapter that an answerer has, or None for the base itself."""
    if is_prompted(name) and prompt is not None and prompt.facts.get("soft"):
        return recipe.run_dir / "prompt" / SOFT
    return recipe.run_dir / "adapter" if name.startswith("tuned") else None


@dataclass(frozen=True)
class Prompted:
    """The rows of an evaluation as the searched prompt asks them.

    Attributes:
        prompt: The prompt.
        rows: The rows that it can word, examined; an ``EvalRows``.
        places: Number of each of them among all rows.
        count: Number of all rows.
    """

    prompt: SearchedPrompt
    rows: Any
    places: Sequence[int]
    count: int

    @property
    def unaskable(self) -> int:
        """Rows that the prompt cannot word, or makes too long; they count as wrong."""
        return self.count - len(self.rows.kept)

    def answers(self, said: Sequence[str]) -> list[str]:
        """Returns an answer to every row, labels for label words; empty where it was not asked."""
        out = [""] * self.count
        for number, text in zip(self.rows.kept, said, strict=True):
            out[self.places[number]] = self.prompt.label_of(text)
        return out

    def question(self, row: int) -> str | None:
        """Returns what is asked in place of a row's own question, or None for a row that is not asked.

        Args:
            row: Its number among all rows.
        """
        number = self._numbers.get(row)
        return None if number is None else question_of(self.rows.example(number))

    @cached_property
    def _numbers(self) -> dict[int, int]:
        return {self.places[number]: at for at, number in enumerate(self.rows.kept)}

    def asking(self, asking: Any) -> Any:
        """Returns how the rows are asked: label words of the recipe belong to the labels as they were."""
        return replace(asking, words={}) if self.prompt.words else asking

    def notes(self) -> list[str]:
        """Returns what the report says of it."""
        behind = " behind soft tokens" if self.prompt.soft else ""
        notes = [f"The searched prompt: {self.prompt.instruction!r}{behind}."]
        if self.unaskable:
            notes.append(f"The searched prompt does not fit {self.unaskable:,} rows; they count as wrong.")
        return notes


def prompted_rows(
    recipe: Recipe, rows: Any, make: Callable[[int, Callable[[int], Example]], Any], instructions: Manifest
) -> Prompted:
    """Returns the kept rows as the prompt in prompt/ asks them.

    Args:
        recipe: Its ``run_dir`` holds prompt/.
        rows: The examined rows, an ``EvalRows``.
        make: Count and example by number to new ``EvalRows``.
        instructions: Manifest of the rows.
    """
    found, media_root = read_prompt(recipe.run_dir / "prompt" / "prompt.json")
    prompt = moved(found, media_root, str(instructions.facts["media_root"]))
    name = names_beside(instructions.facts["media_root"], prompt.media)
    count = len(rows.kept)
    places = [row for row in range(count) if isinstance(asked_with(prompt, rows.whole(row), name), Example)]

    def example(number: int) -> Example:
        asked = asked_with(prompt, rows.whole(places[number]), name)
        assert isinstance(asked, Example)
        return asked

    prompted = make(len(places), example)
    for _ in prompted.examine():
        pass
    return Prompted(prompt, prompted, places, count)
