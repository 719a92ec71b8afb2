"""What eval is about to do, checked before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmtune.errors import DataError, RecipeError
from mmtune.models.tuned_from import Base, base_at, base_of
from mmtune.prompts.wordings import WORDINGS
from mmtune.recipe import Eval, Recipe
from mmtune.recipe.evaluation import BY_STATES
from mmtune.stages.evaluate.ensemble import Member, check_members, check_wordings, members_of
from mmtune.stages.evaluate.prompted import prompt_of
from mmtune.stages.evaluate.shots import features_of
from mmtune.storage import Manifest, is_finished, open_split, read_manifest

SCHEMA = "mmtune.report/2"
"""Of the report document."""


@dataclass(frozen=True)
class Plan:
    """What is evaluated, and from what.

    ``members`` are adapters that answer beside adapter/, ``notes`` what is to be known of where adapter/ comes from.
    """

    recipe: Recipe
    settings: Eval
    instructions: Manifest
    adapter: Manifest | None
    features: Manifest | None
    prompt: Manifest | None
    base: Base
    limit: int | None
    offline: bool
    members: tuple[Member, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        """Folder or hub id of the base model."""
        return self.base.path

    @property
    def revision(self) -> str | None:
        """Of the base model; None for the newest."""
        return self.base.revision


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


def check_one_state(settings: Eval, model: str, revision: str | None, *, offline: bool) -> None:
    """Raises RecipeError where a model reads a row in several passes and eval compares the one state of a row."""
    from mmtune.models.composite.scores import branches_of_config
    from mmtune.models.load import load_config

    passes = branches_of_config(load_config(model, revision=revision, offline=offline))
    if settings.answer in BY_STATES and len(passes) > 1:
        raise RecipeError(
            f"eval.answer {settings.answer} compares one state per row;"
            f" this model reads rows in passes: {', '.join(passes)}",
            "set eval.answer to rank or generate",
            "several_states",
        )


def check_eval(recipe: Recipe, *, offline: bool) -> None:
    """Checks, before the first stage of a run, what its last one would end with: scores, split, further adapters.

    Raises:
        RecipeError: As ``check_scores``, no source has rows of the split, or as ``check_one_state`` for a model that
            is there.
        DataError: As ``members_of``.
        IntegrityError: As ``check_members``.
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
    if recipe.model is not None:
        path, revision, members = recipe.model.path, recipe.model.revision, members_of(recipe.eval)
        there = bool(members) and recipe.pretrain is None
        check_members(members, path, base_at(path, revision, offline=offline).weights if there else None)
        if recipe.pretrain is None and recipe.eval.answer in BY_STATES:
            check_one_state(recipe.eval, recipe.model.path, recipe.model.revision, offline=offline)


def check_rows(run_dir: Path, settings: Eval) -> Manifest:
    """Returns the manifest of instructions/, which holds what eval asks.

    Raises:
        DataError: They are missing, have no rows in the split, or none with options where eval chooses among these,
            or none that the wordings of an ensemble fit.
        IntegrityError: They do not keep those wordings.
    """
    folder, split = run_dir / "instructions", settings.split
    instructions = read_manifest(folder, made_by="build-data")
    if not instructions.rows.get(split):
        have = ", ".join(f"{name} ({count:,})" for name, count in instructions.rows.items() if count)
        named = any(source["split"] == split for source in instructions.config["sources"])
        wanted = "widen `part` or mend the rows of its sources" if named else f"add a source with `split: {split}`"
        raise DataError(
            f"instructions/ has no rows in the split {split!r}; it has {have or 'none'}",
            f"set eval.split, or {wanted} and run: mmtune build-data",
            "split_missing",
        )
    if settings.answer in BY_STATES:
        options = open_split(folder / split).column("options")
        if not any(bool(row) for part in options.chunks for row in part.to_pylist()):
            raise no_options(settings)
    check_wordings(settings, folder, instructions)
    return instructions


def no_options(settings: Eval) -> DataError:
    """Returns the error of rows that have nothing to choose among."""
    return DataError(
        f"eval.answer {settings.answer} chooses among options, and no row of {settings.split} has any",
        'name them, as in `sources[].columns.options: "=yes|no"` or a column that lists them; or set eval.answer:'
        " generate",
        "no_options",
    )


def plan_of(recipe: Recipe, limit: int | None, offline: bool) -> Plan:
    """Checks everything that can be checked before a model is loaded.

    Raises:
        DataError: instructions/, adapter/, features/ or prompt/ is missing, or the split has no rows that can be asked.
        IntegrityError: They were made of other rows or another model, or rows do not keep the wordings of an ensemble.
        RecipeError: A metric is unknown, a bar is no score of 100, or no model is named.
    """
    settings = recipe.eval or Eval()
    check_scores(settings)
    instructions = check_rows(recipe.run_dir, settings)
    adapter = None
    if any(name.startswith("tuned") for name in settings.compare):
        adapter = read_manifest(recipe.run_dir / "adapter", made_by="finetune")
    base = base_of(adapter.config if adapter else None, recipe.named_model, offline=offline)
    most = min((value for value in (limit, settings.limit) if value is not None), default=None)
    features = features_of(recipe, settings)
    prompt = prompt_of(recipe, settings, instructions, base, adapter)
    members = members_of(settings)
    check_members(members, base.path, base.weights)
    notes = () if adapter is None else _origin(recipe.run_dir, adapter, instructions, settings.split)
    return Plan(recipe, settings, instructions, adapter, features, prompt, base, most, offline, members, notes)


def _origin(run_dir: Path, adapter: Manifest, instructions: Manifest, split: str) -> tuple[str, ...]:
    """Returns a note where adapter/ is seen to have learned from other rows than instructions/ holds by now."""
    if not is_finished(run_dir / "tokens"):
        return ()
    tokens = read_manifest(run_dir / "tokens")
    same = adapter.parents.get("tokens") == tokens.hash
    if same and tokens.parents.get("instructions") == instructions.hash_without(WORDINGS):
        return ()
    older = "tokens/ that were replaced since" if not same else "other rows than instructions/ holds by now"
    return (f"adapter/ was tuned on {older}; it may have learned some of the rows of {split} that it is asked here.",)
