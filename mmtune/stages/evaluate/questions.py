"""The rows that eval asks, in every way that the recipe names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mmtune.encoding.render import Renderer
from mmtune.errors import DataError
from mmtune.evaluation.comparison import ScoredRow
from mmtune.evaluation.prototypes import SolvedRows
from mmtune.evaluation.reach import out_of_reach
from mmtune.evaluation.rows import ChosenExamples, EvalRows, no_context, question_of, scored_row
from mmtune.evaluation.vqa import few_references
from mmtune.prompts.schema import row_to_example
from mmtune.prompts.searched import shortenable
from mmtune.prompts.wordings import WORDINGS
from mmtune.recipe.evaluation import BY_STATES
from mmtune.stages.evaluate.ensemble import Worded, worded_rows
from mmtune.stages.evaluate.plan import Plan
from mmtune.stages.evaluate.prompted import Prompted, is_prompted, prompted_rows
from mmtune.stages.evaluate.saying import notes_of, said_of_fewer
from mmtune.stages.evaluate.shots import Asked, asked_rows
from mmtune.stages.evaluate.solved import solved_rows
from mmtune.storage import RejectLog, open_split
from mmtune.talk import Talk


@dataclass(frozen=True)
class Questions:
    """What the models are asked.

    Attributes:
        rows: The rows that fit, as they stand.
        scored: What scoring needs of them.
        asked: They in every way, with exemplars or without.
        prompted: They as the searched prompt asks them, or None.
        read: How many rows were looked at.
        rejected: Reason to the number of those that do not fit.
        solved: Training rows whose states answer, or None.
        worded: The rows in further wordings, or None.
        lost: What to say of rows whose options hold no right answer.
    """

    rows: EvalRows
    scored: Sequence[ScoredRow]
    asked: Asked
    prompted: Prompted | None
    read: int
    rejected: Mapping[str, int]
    solved: SolvedRows | None = None
    worded: Worded | None = None
    lost: Sequence[str] = ()

    def question(self, row: int) -> tuple[str, str]:
        """Returns the question of a kept row in its own words, and in those of the searched prompt if it asks it."""
        own = question_of(self.rows.example(row))
        found = self.prompted.question(row) if self.prompted else None
        return own, own if found is None else found

    def prompt_to(self, name: str, row: int) -> str:
        """Returns what an answerer of the report was asked for a kept row."""
        own, searched = self.question(row)
        if is_prompted(name):
            return searched
        further = self.worded.question(name.partition(", ")[2], row) if self.worded else None
        return own if further is None else further

    def notes(self) -> list[str]:
        """Returns what a reader of the report must know of them."""
        notes = few_references([row.references for row in self.scored if "vqa_accuracy" in row.metrics])
        notes += self.lost
        notes += self.prompted.notes() if self.prompted else []
        notes += self.worded.notes() if self.worded else []
        if cut := sum(self.rows.shortened):
            notes.append(f"The contexts of {cut:,} rows were cut to fit tokenize.max_length.")
        return [*notes, *notes_of(self.asked.facts, len(self.scored))]


def questions_of(plan: Plan, processor: Any, rejects: Path, console: Talk) -> Questions:
    """Returns the rows of the split in every way; those that do not fit are written to a file.

    Args:
        plan: What is evaluated.
        processor: The base model's.
        rejects: That file.
        console: Shows progress, and says what is amiss: too few exemplars, options without a right answer.

    Raises:
        DataError: No row can be asked, or there is nothing to show before them.
        RecipeError: No row has an exemplar, or a pool is unknown.
    """
    recipe, settings, tokenize = plan.recipe, plan.settings, plan.recipe.tokenize
    table = open_split(recipe.run_dir / "instructions" / settings.split)
    examples = ChosenExamples(table.to_batches(), row_to_example, plan.limit)
    make = partial(
        EvalRows,
        renderer=Renderer(processor, video_frames=tokenize.video_frames),
        max_length=tokenize.max_length,
        drop_turns=tokenize.too_long == "drop_turns",
        context=shortenable if tokenize.too_long == "shorten" else no_context,
    )
    rows = make(len(examples), examples)
    scored = _scored(rows, None if settings.metrics == "auto" else settings.metrics, len(examples), console)
    with RejectLog(rejects) as log:
        for reject in rows.rejects:
            log.write(reject)
    if not scored:
        raise DataError(f"no row can be asked: {log.counts}", "look at tokenize.max_length and the model", "no_rows")
    asked = asked_rows(recipe, settings, rows, make, plan.instructions, plan.features)
    lost = [] if settings.answer == "generate" else out_of_reach(scored)
    for line in (*said_of_fewer(asked.facts, len(scored)), *(f"eval: {line.rstrip('.')}" for line in lost)):
        console.note(line)
    prompted = prompted_rows(recipe, rows, make, plan.instructions) if plan.prompt is not None else None
    solved = solved_rows(plan, rows, make, console) if settings.answer in BY_STATES else None
    further = worded_rows(rows) if settings.ensemble is not None and settings.ensemble.wordings else None
    return Questions(rows, scored, asked, prompted, len(examples), log.counts, solved, further, lost)


def _scored(rows: EvalRows, chosen: Sequence[str] | None, total: int, console: Talk) -> list[ScoredRow]:
    """Encodes every example once; returns what scoring needs of those that fit."""
    scored = []
    with console.progress(total, "eval encode") as bar:
        for example in rows.examine():
            bar.advance(1)
            if example is not None:
                # What predictions carry need not repeat every wording.
                metadata = {key: text for key, text in example.metadata.items() if key != WORDINGS}
                scored.append(scored_row(replace(example, metadata=metadata), chosen))
    return scored
