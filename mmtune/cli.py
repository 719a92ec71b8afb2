"""Every command: parse, call one stage, print. Stages are imported inside their commands."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmtune import __version__
from mmtune.errors import RecipeError
from mmtune.talk import Talk, json_line

if TYPE_CHECKING:
    from mmtune.recipe import Recipe

EPILOG = (
    "Exit codes: 0 ok, 1 bug, 2 recipe or usage, 3 bad data, 4 missing capability, 5 resources, 6 diverged, "
    "7 integrity, 8 locked by another run, 9 a gate not met, 75 interrupted and resumable, 130 SIGINT, 141 broken pipe."
)

app = typer.Typer(
    name="mmtune",
    help="Raw multimodal data to an instruction-tuned model and an honest before/after report.",
    epilog=EPILOG,
    invoke_without_command=True,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else None,
    pretty_exceptions_enable=False,
)


def _go_offline(value: bool) -> bool:
    # The hub's library reads this once, when it is imported: before any stage is.
    if value:
        os.environ["HF_HUB_OFFLINE"] = "1"
    return value


RecipePath = Annotated[
    Path | None, typer.Argument(help="Recipe file; ./mmtune.yaml when left out.", show_default=False)
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key: a.b=value (repeatable).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, on failure too.")]
Force = Annotated[bool, typer.Option("--force", help="Redo, also when nothing changed.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, write nothing.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="At most this many rows.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Override the recipe's seed.")]
Offline = Annotated[bool, typer.Option("--offline", callback=_go_offline, help="Never reach for the network.")]
Resume = Annotated[str, typer.Option("--resume", help="auto goes on from the newest checkpoint; never.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings on stderr.")]


def _load(recipe: Path | None, overrides: list[str] | None, seed: int | None) -> Recipe:
    # The schema takes a tenth of a second to build; `--help` does without it.
    from mmtune.recipe_text import load_recipe

    extra = [] if seed is None else [f"seed={seed}"]
    return load_recipe(recipe, [*(overrides or ()), *extra])


def _check_resume(resume: str) -> None:
    if resume not in ("auto", "never"):
        raise RecipeError(f"--resume {resume!r}: expected auto or never", "leave it out to go on where a run stopped")


def _finish(command: str, result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json_line({"ok": True, "schema": f"mmtune.{command}/1", **result}))


@app.command("build-data", epilog=EPILOG)
def build_data(
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
    """Raw sources to instructions/.

    Example: mmtune build-data recipes/quickstart.yaml --limit 100
    """
    from mmtune.stages.build_data import build_data as stage

    loaded = _load(recipe, overrides, seed)
    result = stage(loaded, force=force, dry_run=dry_run, limit=limit, console=Talk(quiet))
    _finish("build-data", result, as_json)


app.command("build-instructions", hidden=True)(build_data)


@app.command("extract", epilog=EPILOG)
def extract(
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
    """Media, texts and histories to features/ by frozen encoders, with a search index.

    Example: mmtune extract recipes/features.yaml --limit 100
    """
    from mmtune.stages.extract import extract as stage

    loaded = _load(recipe, overrides, seed)
    result = stage(loaded, force=force, dry_run=dry_run, limit=limit, offline=offline, console=Talk(quiet))
    _finish("extract", result, as_json)


@app.command("tokenize", epilog=EPILOG)
def tokenize(
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
    """instructions/ to tokens/: ids, loss mask and media spans, without decoding a pixel.

    Example: mmtune tokenize recipes/quickstart.yaml
    """
    from mmtune.stages.tokenize import tokenize as stage

    loaded = _load(recipe, overrides, seed)
    console = Talk(quiet)
    if loaded.pretrain is not None:
        from mmtune.order import pretrain_stages, run_stages

        # The processor comes with the parts that pretrain joins.
        parts = pretrain_stages(loaded, limit, "auto", offline, train=False)
        run_stages(loaded, parts, force=False, dry_run=dry_run, console=console)
    result = stage(loaded, force=force, dry_run=dry_run, limit=limit, offline=offline, console=console)
    _finish("tokenize", result, as_json)


@app.command("pretrain", epilog=EPILOG)
def pretrain(
    recipe: RecipePath = None,
    overrides: Set = None,
    resume: Resume = "auto",
    force: Force = False,
    dry_run: DryRun = False,
    limit: Limit = None,
    seed: Seed = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Encoders and a language model, joined and trained on instructions/, to base/.

    Example: mmtune pretrain recipes/represent.yaml
    """
    from mmtune.order import pretrain_stages, run_stages

    _check_resume(resume)
    loaded, console = _load(recipe, overrides, seed), Talk(quiet)
    results: dict[str, Any] = {}
    for stage in pretrain_stages(loaded, limit, resume, offline):
        again = force and stage[0] == "pretrain"
        results |= run_stages(loaded, iter([stage]), force=again, dry_run=dry_run, console=console)
    _finish("pretrain", results.get("pretrain", {"stage": "pretrain", "dry_run": True}), as_json)


@app.command("finetune", epilog=EPILOG)
def finetune(
    recipe: RecipePath = None,
    overrides: Set = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, help="Train on this many GPUs of this machine.")] = None,
    cpu_processes: Annotated[
        int | None, typer.Option("--cpu-processes", min=1, help="Train on this many CPU processes (gloo).")
    ] = None,
    nodes: Annotated[
        int, typer.Option("--nodes", min=1, help="Machines; run the same command on each, on a shared run_dir.")
    ] = 1,
    rendezvous: Annotated[
        str | None, typer.Option("--rendezvous", help="HOST:PORT where the machines meet, with --nodes.")
    ] = None,
    resume: Resume = "auto",
    force: Force = False,
    dry_run: DryRun = False,
    limit: Limit = None,
    seed: Seed = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """tokens/ to adapter/: LoRA or full tuning with exact resume.

    Example: mmtune finetune recipes/quickstart.yaml --gpus 4
    """
    from mmtune.stages import finetune as stage

    _check_resume(resume)
    loaded = _load(recipe, overrides, seed)
    processes = gpus or cpu_processes or 1
    console = Talk(quiet or not stage.is_main())
    if processes * nodes > 1 and not stage.is_launched() and not dry_run:
        cpu = gpus is None and cpu_processes is not None
        stage.launch(sys.argv[1:], processes, cpu=cpu, nodes=nodes, rendezvous=rendezvous, console=console)
        return
    result = stage.finetune(
        loaded, force=force, dry_run=dry_run, limit=limit, resume=resume, offline=offline, console=console
    )
    if stage.is_main():
        _finish("finetune", result, as_json)


@app.command("eval", epilog=EPILOG)
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
    """Models and instructions/ to report/: the same rows on base and tuned model, with intervals.

    Example: mmtune eval recipes/quickstart.yaml --json
    """
    from mmtune.stages.evaluate import evaluate as stage

    loaded = _load(recipe, overrides, seed)
    result = stage(loaded, force=force, dry_run=dry_run, limit=limit, offline=offline, console=Talk(quiet))
    _finish("eval", result, as_json)


app.command("evaluate", hidden=True)(evaluate)


@app.command("score", epilog=EPILOG)
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
        _finish("score", result, True)
    else:
        print(json_line(result))


@app.command("run", epilog=EPILOG)
def run(
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
    """Every stage that the recipe names, in order; finished ones are skipped.

    Example: mmtune run recipes/quickstart.yaml
    """
    from mmtune.order import run_stages, stages_of

    loaded = _load(recipe, overrides, seed)
    stages = stages_of(loaded, limit, offline)
    results = run_stages(loaded, stages, force=force, dry_run=dry_run, console=Talk(quiet))
    _finish("run", {"run_dir": str(loaded.run_dir), "stages": results}, as_json)


@app.command("init", epilog=EPILOG)
def init(
    name: Annotated[str | None, typer.Argument(help="Recipe to copy; left out: list them.")] = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """List the shipped recipes, or copy one into this folder.

    Example: mmtune init quickstart
    """
    from mmtune.stages.init import copy_recipe, list_recipes

    if name is None:
        recipes = list_recipes()
        if as_json:
            _finish("init", {"recipes": recipes}, True)
        else:
            for item in recipes:
                print(f"{item['name']:24} {item['about']}")
        return
    written = copy_recipe(name, Path.cwd(), force=force, dry_run=dry_run)
    if dry_run:
        Talk().say(f"init: would write {written}")
        _finish("init", {"path": str(written), "dry_run": True}, as_json)
        return
    Talk().say(f"wrote {written}; next: see its first lines for the data that it takes, then mmtune run {written.name}")
    _finish("init", {"path": str(written)}, as_json)


@app.command("show", epilog=EPILOG)
def show(
    path: Annotated[Path, typer.Argument(help="A stage folder, or a run_dir.")],
    row: Annotated[int, typer.Option("--row", min=0, help="Which row to show.")] = 0,
    split: Annotated[str | None, typer.Option("--split", help="Which split; default the first.")] = None,
    as_json: Json = False,
) -> None:
    """What is in a stage folder: manifest, counts, rejects and one row with its loss mask.

    Example: mmtune show runs/quickstart/tokens --row 3
    """
    from mmtune.stages.show import describe, render

    result = describe(path, row=row, split=split)
    if as_json:
        _finish("show", result, True)
    else:
        print(render(result))


@app.command("doctor", epilog=EPILOG)
def doctor(as_json: Json = False) -> None:
    """Versions, devices and decoders; what is missing and how to install it.

    Example: mmtune doctor --json
    """
    from mmtune.stages.doctor import examine, render

    result = examine()
    if as_json:
        _finish("doctor", result, True)
    else:
        print(render(result))


@app.command("keys", epilog=EPILOG)
def keys(
    section: Annotated[str, typer.Argument(help="A section or key, such as finetune.lora; left out: all.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="The JSON Schema of a recipe, for editors.")] = False,
) -> None:
    """Every key of a recipe: type, default and meaning.

    Example: mmtune keys finetune
    """
    from mmtune.stages.keys import list_keys, render, schema

    if as_json:
        _finish("keys", {"recipe": schema(section)}, True)
    else:
        print(render(list_keys(section)))


def _version(value: bool) -> None:
    if value:
        print(f"mmtune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(RecipeError.exit_code)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Deprecations inside the libraries are for their callers, not for the person at the command line.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
