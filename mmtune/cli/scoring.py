"""The commands that score: eval with models, score without one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmtune.cli.options import DryRun, Force, Json, Limit, Offline, Quiet, RecipePath, Seed, Set, finish, load
from mmtune.talk import Talk, json_line


def evaluate(
    recipe: RecipePath = None,
    overrides: Set = None,
    force: Force = False,
    dry_run: DryRun = False,
    limit: Limit = None,
    seed: Seed = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Base and tuned model to report/. Both answer the same rows, and scores have intervals.

    Example: mmtune eval recipes/quickstart.yaml --json
    """
    from mmtune.stages.evaluate import evaluate as stage

    loaded = load(recipe, overrides, seed)
    result = stage(loaded, force=force, dry_run=dry_run, limit=limit, offline=offline, console=Talk(quiet))
    finish("eval", result, as_json)


def score(
    metric: Annotated[str, typer.Argument(help="vqa, exact_match, accuracy, relaxed_accuracy, token_f1, ...")],
    predictions: Annotated[Path, typer.Option("--predictions", help="Predictions file (JSON or JSONL).")],
    questions: Annotated[Path | None, typer.Option("--questions", help="Official VQA questions file.")] = None,
    annotations: Annotated[Path | None, typer.Option("--annotations", help="Official VQA annotation file.")] = None,
    references: Annotated[Path | None, typer.Option("--references", help="References file (JSONL).")] = None,
    as_json: Json = False,
) -> None:
    """Score a predictions file against references, without a model.

    Rows: {"id": "1", "prediction": "cat", "references": ["cat"]}, or the references by id in a file of their own; for
    vqa the official results [{"question_id": 42, "answer": "yes"}], or a report's predictions.jsonl.

    Example: mmtune score vqa --predictions results.json --questions q.json --annotations a.json --json
    """
    from mmtune.stages.score import score as stage

    result = stage(metric, predictions=predictions, questions=questions, annotations=annotations, references=references)
    if as_json:
        finish("score", result, True)
    else:
        print(json_line(result))
