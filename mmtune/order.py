"""The order of the stages of a run, each imported when its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

from mmtune.errors import RecipeError
from mmtune.storage import is_finished
from mmtune.talk import Talk

if TYPE_CHECKING:
    from mmtune.recipe import Recipe

NEEDS = {
    "extract": (),
    "build-data": (),
    "assemble": (),
    "prompt": ("instructions",),
    "tokenize": ("instructions",),
    "pretrain": ("tokens", "start"),
    "finetune": ("tokens",),
    "eval": ("instructions",),
    "export": ("adapter", "tokens"),
}
"""The folders that a stage of any run reads; see ``_needs``."""
NEEDS_OF_BASE = {"tokenize": ("start",), "prompt": ("base",), "finetune": ("base",), "eval": ("base",)}
"""More of them, where pretrain makes the base model."""

Stage = tuple[str, Callable[..., dict[str, Any]], dict[str, Any]]


def stages_of(recipe: Recipe, limit: int | None, offline: bool) -> Iterator[Stage]:
    """Yields name, function and own options of every stage of a run; what only a late one needs is checked first.

    Raises:
        RecipeError: The model's folder is not there, ``prompt.budget`` is too small for its method, or eval or export
            could not end well whatever is trained.
        CapabilityError: A library of that method is missing.
    """
    if recipe.model is not None and recipe.pretrain is None:
        from mmtune.stages.tokenize import check_model

        check_model(recipe)
    if recipe.prompt is not None:
        from mmtune.stages.prompt import check_budget

        check_budget(recipe.prompt, limit)
    if recipe.eval is not None:
        from mmtune.stages.evaluate.plan import check_eval

        check_eval(recipe, offline=offline)
    if recipe.export is not None:
        from mmtune.stages.export import check_export

        check_export(recipe)
    if recipe.extract is not None:
        from mmtune.stages.extract import extract as extract_stage

        yield "extract", extract_stage, {"limit": limit, "offline": offline}
    from mmtune.stages.build_data import build_data as build_stage

    yield "build-data", build_stage, {"limit": limit}
    if recipe.pretrain is not None:
        from mmtune.stages.assemble import assemble_stage

        yield "assemble", assemble_stage, {"offline": offline}
    if recipe.prompt is not None and recipe.prompt.on == "base" and recipe.pretrain is None:
        yield _prompt(offline)
    if recipe.model is not None:
        from mmtune.stages.tokenize import tokenize as tokenize_stage

        yield "tokenize", tokenize_stage, {"offline": offline}
    if recipe.pretrain is not None:
        from mmtune.stages.pretrain import pretrain as pretrain_stage

        yield "pretrain", pretrain_stage, {"offline": offline}
        if recipe.prompt is not None and recipe.prompt.on == "base":
            yield _prompt(offline)
    if recipe.finetune is not None:
        from mmtune.stages.finetune import finetune as finetune_stage

        yield "finetune", finetune_stage, {"offline": offline}
    if recipe.prompt is not None and recipe.prompt.on == "tuned":
        yield _prompt(offline)
    if recipe.eval is not None:
        from mmtune.stages.evaluate import evaluate as evaluate_stage

        yield "eval", evaluate_stage, {"offline": offline}
    if recipe.export is not None:
        from mmtune.stages.export import export as export_stage

        yield "export", export_stage, {"offline": offline}


def _prompt(offline: bool) -> Stage:
    from mmtune.stages.prompt import prompt as prompt_stage

    return "prompt", prompt_stage, {"offline": offline}


def run_stages(recipe: Recipe, stages: Iterator[Stage], *, force: bool, dry_run: bool, console: Talk) -> dict[str, Any]:
    """Runs stages one after the other; returns their result documents by name.

    A dry run says of a stage that reads what is not there yet only that it would run then. Rows for eval must be left
    before anything is trained.

    Args:
        recipe: The recipe.
        stages: From ``stages_of``.
        force: Redo them.
        dry_run: Write nothing.
        console: Where they speak.
    """
    results: dict[str, Any] = {}
    for name, stage, options in stages:
        missing = [folder for folder in _needs(name, recipe) if dry_run and not is_finished(recipe.run_dir / folder)]
        if missing:
            console.say(f"{name}: would run once {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} there")
            continue
        results[name] = stage(recipe, **options, force=force, dry_run=dry_run, console=console)
        if (
            name == "build-data"
            and not dry_run
            and recipe.eval is not None
            and is_finished(recipe.run_dir / "instructions")
        ):
            from mmtune.stages.evaluate.plan import check_rows
            from mmtune.stages.evaluate.solved import check_solved

            # Where every row of it was refused or has no options, training would come first and this error last.
            check_rows(recipe.run_dir, recipe.eval)
            check_solved(recipe.run_dir, recipe.eval)
    return results


def early_end(recipe: Recipe) -> str:
    """Returns after which stage a run stops that neither searches, tunes, scores nor exports, and why; else nothing."""
    if any(part is not None for part in (recipe.prompt, recipe.finetune, recipe.eval, recipe.export)):
        return ""
    if recipe.model is None:
        return "no model in the recipe: stopped after build-data"
    return f"neither finetune nor eval in the recipe: stopped after {'pretrain' if recipe.pretrain else 'tokenize'}"


def _needs(name: str, recipe: Recipe) -> tuple[str, ...]:
    """Returns the folders that a stage of this recipe reads."""
    needs, exemplars = NEEDS[name], recipe.build.exemplars
    if recipe.pretrain is not None:
        needs += NEEDS_OF_BASE.get(name, ())
    if name == "build-data" and exemplars is not None and exemplars.method == "retrieval":
        needs += ("features",)
    if name == "assemble" and recipe.pretrain is not None and recipe.pretrain.build.reads_items:
        needs += ("instructions",)
    if name == "prompt" and recipe.prompt is not None and recipe.prompt.on == "tuned":
        needs += ("adapter",)
    if name == "eval" and recipe.eval is not None:
        needs += ("adapter",) if any(one.startswith("tuned") for one in recipe.eval.compare) else ()
        needs += ("prompt",) if any(one.endswith("prompt") for one in recipe.eval.compare) else ()
    return needs


PRETRAIN = ("assemble", "tokenize", "pretrain")
"""What stands between instructions/ and base/: the parts joined, their tokens, the training."""


def pretrain_stages(
    recipe: Recipe, limit: int | None, resume: str, offline: bool, wanted: Collection[str] = PRETRAIN
) -> Iterator[Stage]:
    """Yields the stages of ``PRETRAIN`` that are wanted, in order.

    Args:
        recipe: The recipe.
        limit: At most this many training rows.
        resume: ``auto`` or ``never``.
        offline: Never reach for the network.
        wanted: Some of ``PRETRAIN``.

    Raises:
        RecipeError: The recipe has no ``pretrain``.
    """
    if recipe.pretrain is None:
        raise RecipeError("the recipe has no `pretrain` section", "add one: mmtune keys pretrain")
    for name, stage, options in stages_of(recipe, None, offline):
        if name in wanted:
            more = {"limit": limit, "resume": resume} if name == "pretrain" else {}
            yield name, stage, {**options, **more}
        if name == PRETRAIN[-1]:
            return
