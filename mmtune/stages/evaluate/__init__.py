"""eval: models and instructions/ to report/. Wiring only; the numbers are made in ``evaluation``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtune.errors import GateError
from mmtune.recipe import Recipe
from mmtune.stages.evaluate.plan import SCHEMA, Plan, plan_of
from mmtune.storage import Staging, foresee, open_stage
from mmtune.talk import Talk


def evaluate(
    recipe: Recipe,
    *,
    force: bool = False,
    dry_run: bool = False,
    limit: int | None = None,
    offline: bool = False,
    console: Talk,
) -> dict[str, Any]:
    """Lets every model answer the same rows and writes report/; returns the result document.

    Raises:
        DataError: instructions/ or adapter/ is missing, or no row can be asked.
        RecipeError: A metric is unknown, or a bar is no score of 100.
        GateError: A score is below ``eval.fail_under``; the report is published first.
        Interrupted: A signal came; nothing was written.
    """
    plan = plan_of(recipe, limit, offline)
    for note in plan.notes:
        console.note(note)
    config = {
        "eval": plan.settings.model_dump(mode="json", exclude={"fail_under"}),
        "tokenize": recipe.tokenize.model_dump(mode="json", exclude={"workers", "layout"}),
        "model": plan.model,
        "weights": plan.base.weights,
        "revision": plan.revision,
        "seed": recipe.seed,
        "limit": plan.limit,
        "description": recipe.description,
        "schema": SCHEMA,
    }
    parents = {"instructions": plan.instructions.hash}
    if plan.adapter is not None:
        parents["adapter"] = plan.adapter.hash
    if plan.features is not None:
        parents["features"] = plan.features.hash
    if plan.prompt is not None:
        parents["prompt"] = plan.prompt.hash
    parents |= {f"adapter of {member.name}": member.made.hash for member in plan.members}
    target = recipe.run_dir / "report"
    if dry_run:
        console.say(foresee(target, stage="eval", config=config, parents=parents, force=force))
        rows = plan.instructions.rows[plan.settings.split]
        return {"stage": "eval", "dry_run": True, "target": str(target), "rows": rows, "config": config}
    staging = open_stage(target, stage="eval", config=config, parents=parents, force=force, say=console.say)
    if staging is None:
        report = json.loads((target / "metrics.json").read_text("utf-8"))
    else:
        with staging:
            report = _write(plan, staging, console)
    return _finish(plan, report, target, console, cached=staging is None)


def _write(plan: Plan, staging: Staging, console: Talk) -> dict[str, Any]:
    from mmtune.encoding.processor import load_processor
    from mmtune.stages.evaluate.answers import answers_of
    from mmtune.stages.evaluate.document import freely_answered, write_stage
    from mmtune.stages.evaluate.questions import questions_of

    tokenize = plan.recipe.tokenize
    processor = load_processor(
        plan.model,
        revision=plan.revision,
        offline=plan.offline,
        min_image_pixels=tokenize.min_image_pixels,
        max_image_pixels=tokenize.max_image_pixels,
    )
    questions = questions_of(plan, processor, staging.path / "rejects.jsonl", console)
    answers = answers_of(plan, processor, questions, console)
    free = freely_answered(plan, questions, answers)
    for line in free:
        console.note(line.rstrip("."))
    return write_stage(plan, questions, answers, free, staging)


def _finish(plan: Plan, report: Mapping[str, Any], target: Path, console: Talk, *, cached: bool) -> dict[str, Any]:
    """Prints the table and checks the gates; returns the result document."""
    from mmtune.evaluation.comparison import failed_gates
    from mmtune.reports.extras import extra_tables
    from mmtune.reports.tables import perplexity_rows, table_rows
    from mmtune.reports.wording import headline, rows_said

    head, rows = table_rows(report)
    console.table(f"{plan.settings.split}, {rows_said(report)}", head, rows)
    if report["perplexity"]:
        console.table("perplexity of the reference answers", *perplexity_rows(report["perplexity"]))
    for extra in extra_tables(report, every_metric=False):
        console.table(extra.title, extra.head, extra.rows)
    console.say(f"eval: {headline(report)}")
    page = target / "index.html"
    console.say(f"eval: wrote {page}" if not cached else f"eval: see {page}")
    result = {
        "stage": "eval",
        "cached": cached,
        "target": str(target),
        "page": str(page),
        "rows": report["n"],
        "rejected": report["rejected"],
        "metrics": report["metrics"],
        "sources": report["groups"].get("source", {}),
        "perplexity": report["perplexity"],
        **{name: report.get(name) for name in ("fusion", "ablation", "filling")},
    }
    judged = report["run"]["compare"][-1]
    missed = failed_gates(report["metrics"], judged, plan.settings.fail_under)
    if missed:
        raise GateError("; ".join(missed), f"the report is written: {page}", "gate")
    return result
