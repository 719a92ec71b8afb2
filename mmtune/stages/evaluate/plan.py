"""What eval is about to do, checked before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from mmtune.errors import DataError, IntegrityError, RecipeError
from mmtune.recipe import Eval, Recipe
from mmtune.stages.evaluate.ensemble import Member, check_wordings, members_of
from mmtune.stages.evaluate.prompted import prompt_of
from mmtune.stages.evaluate.shots import features_of
from mmtune.storage import Manifest, read_manifest

SCHEMA = "mmtune.report/2"
"""Of the report document."""


@dataclass(frozen=True)
class Plan:
    """What is evaluated, and from what; ``members`` are adapters that answer beside adapter/."""

    recipe: Recipe
    settings: Eval
    instructions: Manifest
    adapter: Manifest | None
    features: Manifest | None
    prompt: Manifest | None
    model: str
    limit: int | None
    offline: bool
    members: tuple[Member, ...] = ()

    @property
    def revision(self) -> str | None:
        """Of the base model; None for the newest."""
        return self.recipe.model.revision if self.recipe.model else None


def check_scores(settings: Eval) -> None:
    """Checks what a recipe alone tells of its scores.

    Raises:
        RecipeError: A metric is unknown, or a bar is no score of 100.
    """
    from mmtune.evaluation import check_metric
    from mmtune.evaluation.comparison import check_bars

    for name in () if settings.metrics == "auto" else settings.metrics:
        check_metric(name)
    check_bars(settings.fail_under)


def check_eval(recipe: Recipe) -> None:
    """Checks, before the first stage of a run, what its last one would end with: scores and split.

    Raises:
        RecipeError: As ``check_scores``, or no source has rows of the split.
    """
    if recipe.eval is None:
        return
    check_scores(recipe.eval)
    have = sorted({source.split for source in recipe.sources})
    if have and recipe.eval.split not in have:
        raise RecipeError(
            f"eval.split is {recipe.eval.split!r}, the sources have {' and '.join(have)} alone",
            f"set eval.split, or add a source with `split: {recipe.eval.split}`",
            "split_missing",
        )


def check_rows(instructions: Manifest, split: str) -> None:
    """Raises DataError unless instructions/ has rows in the split that is asked."""
    if not instructions.rows.get(split):
        have = ", ".join(f"{name} ({count:,})" for name, count in instructions.rows.items() if count)
        raise DataError(
            f"instructions/ has no rows in the split {split!r}; it has {have or 'none'}",
            f"set eval.split, or add a source with `split: {split}` and run: mmtune build-data",
            "split_missing",
        )


def plan_of(recipe: Recipe, limit: int | None, offline: bool) -> Plan:
    """Checks everything that can be checked before a model is loaded.

    Raises:
        DataError: instructions/, adapter/, features/ or prompt/ is missing, or the split has no rows.
        IntegrityError: They were made of other rows or another model, or rows do not keep the wordings of an ensemble.
        RecipeError: A metric is unknown, a bar is no score of 100, or no model is named.
    """
    settings = recipe.eval or Eval()
    check_scores(settings)
    instructions = read_manifest(recipe.run_dir / "instructions", made_by="build-data")
    check_rows(instructions, settings.split)
    adapter = None
    if any(name.startswith("tuned") for name in settings.compare):
        adapter = read_manifest(recipe.run_dir / "adapter", made_by="finetune")
    asked = recipe.model.path if recipe.model else ""
    made_from = str(adapter.facts.get("model") or "") if adapter else ""
    if asked and made_from and asked != made_from:
        raise IntegrityError(
            f"adapter/ was tuned from {made_from}, the recipe asks for {asked}",
            "run: mmtune finetune --force",
            "other_model",
        )
    if not (asked or made_from):
        raise RecipeError("the recipe names no model", "add `model: {path: ...}`")
    least = [value for value in (limit, settings.limit) if value is not None]
    most, features, model = min(least, default=None), features_of(recipe, settings), made_from or asked
    prompt = prompt_of(recipe, settings, instructions, model)
    check_wordings(settings, instructions)
    members = members_of(settings, model)
    return Plan(recipe, settings, instructions, adapter, features, prompt, model, most, offline, members)
