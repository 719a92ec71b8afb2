"""eval.ensemble at work: which templates or adapters answer together, and what they answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mmtune.errors import DataError, IntegrityError
from mmtune.evaluation.ensemble import together
from mmtune.evaluation.pairs import answerer
from mmtune.evaluation.rows import EvalRows, question_of
from mmtune.prompts.wordings import WORDINGS, names_kept, worded, wordings_of
from mmtune.recipe import Eval
from mmtune.records import Example
from mmtune.storage import Manifest, is_finished, open_split, read_manifest

if TYPE_CHECKING:
    from mmtune.evaluation.asking import Heard

TOGETHER = "ensemble"
"""Behind a model's name: its members together."""


@dataclass(frozen=True)
class Member:
    """A further adapter that answers beside adapter/.

    Attributes:
        name: As the report has it behind the model.
        folder: Of the adapter.
        made: Its manifest.
    """

    name: str
    folder: Path
    made: Manifest


def members_of(settings: Eval) -> tuple[Member, ...]:
    """Returns the further adapters that a recipe names.

    Raises:
        DataError: One is not there.
        IntegrityError: One is no adapter.
    """
    found: list[Member] = []
    for folder in map(Path, settings.ensemble.adapters if settings.ensemble else ()):
        if not is_finished(folder):
            raise DataError(
                f"eval.ensemble.adapters: {folder} is not there or not finished",
                "name folders of finished adapters, such as ../seed1/adapter",
                "adapter_missing",
            )
        made = read_manifest(folder)
        if made.stage != "finetune":
            raise IntegrityError(
                f"eval.ensemble.adapters: {folder} was made by {made.stage}, it is no adapter",
                "name folders of finished adapters, such as ../seed1/adapter",
                "no_adapter",
            )
        name = folder.parent.name if folder.name == "adapter" else folder.name
        again = sum(one.name.partition(" (")[0] == name for one in found) + (name == TOGETHER)
        found.append(Member(f"{name} ({again + 1})" if again else name, folder, made))
    return tuple(found)


def check_members(members: Sequence[Member], model: str, weights: str | None) -> None:
    """Checks that further adapters are those of the base that is asked.

    Args:
        members: The adapters.
        model: Folder or hub id of the base model.
        weights: Its digest, by which a base that moved is known; None where it is not made yet.

    Raises:
        IntegrityError: One was tuned from another model.
    """
    own = {"model": model} if weights is None else {"weights": weights}
    for member in members:
        if any(member.made.config.get(name) != value for name, value in own.items()):
            tuned_from = member.made.config.get("model")
            raise IntegrityError(
                f"eval.ensemble: {member.folder} was tuned from {tuned_from}, eval asks {model}"
                + (" with other weights" if tuned_from == model else ""),
                "name adapters of the same base",
                "other_model",
            )


def check_wordings(settings: Eval, folder: Path, instructions: Manifest) -> None:
    """Checks that the wordings of an ensemble are kept, and that each that is named has a row to ask.

    Args:
        settings: Of eval.
        folder: instructions/.
        instructions: Its manifest.

    Raises:
        IntegrityError: instructions/ does not keep them.
        DataError: One, or all, fit no row of the split that has options.
    """
    wanted = settings.ensemble.wordings if settings.ensemble else ()
    kept = instructions.config.get(WORDINGS, [])
    if wanted and kept != (wanted if isinstance(wanted, str) else list(wanted)):
        raise IntegrityError(
            "instructions/ does not keep the wordings of eval.ensemble", "run: mmtune build-data", "other_wordings"
        )
    if not wanted:
        return
    rows = open_split(folder / settings.split).column("metadata")
    fit = {name for part in rows.chunks for text in part.to_pylist() for name in names_kept(json.loads(text))}
    idle = [] if wanted == "all" else [name for name in wanted if name not in fit]
    if idle or not fit:
        raise DataError(
            f"eval.ensemble.wordings: no row of {settings.split} has options and is asked under"
            f" {' or '.join(idle) or 'any template'}",
            f"name some of: {', '.join(sorted(fit))}" if fit else "leave eval.ensemble out, or give rows options",
            "no_wordings",
        )


@dataclass(frozen=True)
class Worded:
    """The rows with options in their further wordings.

    Attributes:
        rows: Template to the rows that it fits, examined.
        places: Template to the number of each of them among all rows.
        options: Of every row, in its own words.
    """

    rows: Mapping[str, EvalRows]
    places: Mapping[str, Sequence[int]]
    options: Sequence[Sequence[str]]

    def question(self, name: str, row: int) -> str | None:
        """Returns what a row is asked under a template, or None where it is not asked so."""
        number = self._numbers.get(name, {}).get(row)
        return None if number is None else question_of(self.rows[name].example(number))

    @cached_property
    def _numbers(self) -> dict[str, dict[int, int]]:
        return {name: {row: number for number, row in enumerate(own)} for name, own in self.places.items()}

    def notes(self) -> list[str]:
        """Returns what the report says of it."""
        listed = ", ".join(f"{name} ({len(own.kept):,})" for name, own in self.rows.items())
        calls = sum(len(own.kept) for own in self.rows.values())
        return [
            f"The ensemble asks {len(self.options):,} rows {calls:,} times, under the templates {listed}; a row that a"
            " template does not fit keeps the answer to its own wording there, and has no part in the mean."
        ]


def worded_rows(rows: EvalRows) -> Worded:
    """Returns the kept rows in every further wording.

    Args:
        rows: Examined.
    """
    examples = [rows.example(row) for row in range(len(rows.kept))]
    asked: dict[str, list[int]] = {}
    for row, example in enumerate(examples):
        for name in wordings_of(example):
            asked.setdefault(name, []).append(row)
    found, places = {}, {}
    for name, chosen in asked.items():
        own = rows.changed(chosen, _saying(name))
        for _ in own.examine():
            pass
        found[name], places[name] = own, [chosen[number] for number in own.kept]
    return Worded(found, places, [example.options for example in examples])


def _saying(name: str) -> Callable[[int, Example], Example]:
    return lambda row, example: worded(example, name)


def answers_in_wordings(heard: Heard, models: Sequence[str], asked: Worded) -> dict[str, list[str]]:
    """Returns the answers of every model to all rows under each template, and under all of them together.

    Args:
        heard: Answers to the rows as they stand, and probabilities under each template.
        models: Their names.
        asked: The templates.
    """
    texts: dict[str, list[str]] = {}
    for model in models:
        members, shares = [], []
        for name, places in asked.places.items():
            label = answerer(model, name)
            shares.append({places[at]: own for at, own in heard.shares[label].items()})
            own = list(heard.texts[model])
            for row, share in shares[-1].items():
                own[row] = asked.options[row][int(share.argmax())]
            members.append(own)
            texts[label] = own
        if members:
            texts[answerer(model, TOGETHER)] = together(members, shares, asked.options)
    return texts


def answers_of_adapters(heard: Heard, members: Sequence[str], rows: EvalRows) -> dict[str, list[str]]:
    """Returns what adapters answer together.

    Args:
        heard: Answers of each.
        members: Their names, the first adapter/ itself.
        rows: That they were asked.
    """
    options = [rows.example(row).options for row in range(len(rows.kept))]
    shares = [heard.shares[name] for name in members]
    return {answerer(members[0], TOGETHER): together([heard.texts[name] for name in members], shares, options)}
