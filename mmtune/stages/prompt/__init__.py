"""prompt: instructions/ and a frozen model to prompt/. Wiring only; the methods are in ``prompts.search``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtune.files import write_json
from mmtune.models.tuned_from import Base, base_of
from mmtune.prompts.search import METHODS, Sizes
from mmtune.prompts.wordings import WORDINGS
from mmtune.recipe import Eval, Prompt, Recipe
from mmtune.stages.prompt.course import Course, follow
from mmtune.stages.prompt.own import method_name
from mmtune.stages.prompt.rows import choose_rows
from mmtune.storage import Manifest, Staging, foresee, open_stage, read_manifest, stage_hash
from mmtune.talk import Talk

__all__ = ["prompt"]


def prompt(
    recipe: Recipe,
    *,
    force: bool = False,
    dry_run: bool = False,
    limit: int | None = None,
    resume: str = "auto",
    offline: bool = False,
    console: Talk,
) -> dict[str, Any]:
    """Searches a prompt and writes prompt/; returns the result document.

    Args:
        recipe: The recipe; ``prompt``, ``model``, ``tokenize``, ``eval`` and ``seed`` are read.
        force: Search again even if nothing changed.
        dry_run: Check everything and say what would be done; write nothing.
        limit: At most this many dev rows, and test rows.
        resume: auto goes on where a search was stopped; never starts anew.
        offline: Never reach for the network.
        console: Where the talk goes.

    Raises:
        DataError: instructions/ or adapter/ is missing, a split is empty, or the dev rows have one answer.
        RecipeError: The budget is too small, or the settings do not fit the rows.
        CapabilityError: A library or the chat model is not at hand.
        DivergedError: A reward is no number.
        Interrupted: A signal came; the search goes on from its trace.
    """
    settings = recipe.prompt or Prompt()
    # Rows are chosen before the stage is opened, which verifies what it is made from.
    instructions = read_manifest(recipe.run_dir / "instructions", made_by="build-data", verify=True)
    adapter = read_manifest(recipe.run_dir / "adapter", made_by="finetune") if settings.on == "tuned" else None
    base = base_of(adapter.config if adapter else None, recipe.named_model, offline=offline)
    config = _config(recipe, settings, base, limit)
    parents = {"instructions": instructions.hash_without(WORDINGS)}
    parents |= {} if adapter is None else {"adapter": adapter.hash}
    target = recipe.run_dir / "prompt"
    rows = choose_rows(
        recipe.run_dir / "instructions",
        instructions,
        sources=settings.sources,
        dev=min(settings.dev, limit or settings.dev),
        pool=settings.pool,
        test=min(settings.test, limit or settings.test),
        test_split=_test_split(recipe),
    )
    course = Course(recipe, settings, rows, base, Path(instructions.facts["media_root"]), instructions, offline)
    course.check()
    if adapter is not None:
        console.note("the dev rows come out of train, which the adapter has learned: look at the test score alone")
    if dry_run:
        console.say(foresee(target, stage="prompt", config=config, parents=parents, force=force))
        return {"stage": "prompt", "dry_run": True, "target": str(target), **course.plan()}
    staging = open_stage(target, stage="prompt", config=config, parents=parents, force=force, say=console.say)
    if staging is None:
        return {"stage": "prompt", "cached": True, "target": str(target), **_brief(_document(target))}
    kept = recipe.run_dir / "checkpoints" / "prompt"
    if resume == "never":
        shutil.rmtree(kept, ignore_errors=True)
    identity = {"search": stage_hash({"config": config, "parents": parents})}
    with staging:
        document = follow(course, kept, identity, console)
        _publish(staging, document, kept, instructions)
    console.say(f"prompt: wrote {target / 'prompt.json'}")
    return {"stage": "prompt", "cached": False, "target": str(target), **_brief(document)}


def check_budget(settings: Prompt, limit: int | None) -> None:
    """Checks what a recipe alone tells of a search: do its calls and libraries do for its method.

    Args:
        settings: The recipe's section.
        limit: At most this many dev rows.

    Raises:
        RecipeError: The budget is too small.
        CapabilityError: A library is missing.
    """
    rows, name = min(settings.dev, limit or settings.dev), method_name(settings)
    sizes = Sizes(rows=rows, population=settings.population, minibatch=settings.minibatch)
    METHODS[name].check(sizes, settings.budget, name)


def _config(recipe: Recipe, settings: Prompt, base: Base, limit: int | None) -> dict[str, Any]:
    """Returns everything that changes what is found, or what is said of it."""
    asked = recipe.eval or Eval()
    return {
        "prompt": settings.model_dump(mode="json"),
        "eval": asked.model_dump(mode="json", include={"split", "answer", "max_new_tokens", "bootstrap"}),
        "tokenize": recipe.tokenize.model_dump(mode="json", exclude={"workers", "layout"}),
        "model": base.path,
        "weights": base.weights,
        "seed": recipe.seed,
        "limit": limit,
    }


def _publish(staging: Staging, document: Mapping[str, Any], kept: Path, instructions: Manifest) -> None:
    write_json(staging.path / "prompt.json", document)
    for trace in sorted(kept.glob("*.jsonl")):
        shutil.copy(trace, staging.path / trace.name)
    if document["soft"]:
        shutil.copytree(kept / document["soft"], staging.path / document["soft"])
    told = ("method", "model", "calls", "scores", "gap_dev_test", "test_split", "media_root", "soft")
    facts = {key: document[key] for key in told}
    rows = {"dev": document["scores"]["best"]["dev"]["n"], "test": document["scores"]["best"]["test"]["n"]}
    staging.publish(
        rows=rows, drops=document["refused"], facts={**facts, "instruction": document["prompt"]["instruction"]}
    )
    shutil.rmtree(kept, ignore_errors=True)
    if kept.parent.is_dir() and not os.listdir(kept.parent):  # noqa: PTH208
        kept.parent.rmdir()


def _document(target: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((target / "prompt.json").read_text("utf-8"))
    return found


def _brief(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the command says of a prompt, its exemplars by their ids."""
    found = dict(document["prompt"])
    found["exemplars"] = [row["id"] for row in found["exemplars"]]
    # Where the soft tokens are in their subspace says nothing to a reader; the adapter has them.
    found.pop("soft", None)
    left_out = ("schema", "prompt", "media_root")
    return {"prompt": found, **{key: value for key, value in document.items() if key not in left_out}}


def _test_split(recipe: Recipe) -> str:
    settings = recipe.prompt or Prompt()
    return settings.test_split or (recipe.eval or Eval()).split
