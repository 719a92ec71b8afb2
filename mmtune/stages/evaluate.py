"""eval: models and instructions/ to report/. Wiring only; the numbers are made in ``evaluation``."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmtune.errors import DataError, GateError, IntegrityError, Interrupted, RecipeError
from mmtune.files import write_json
from mmtune.recipe import Eval, Recipe
from mmtune.storage import Manifest, RejectLog, Staging, is_finished, open_split, open_stage, read_manifest
from mmtune.talk import Talk

SCHEMA = "mmtune.report/1"
_CACHE_BYTES = 256 << 20
_FEW_REFERENCES = "VQA accuracy: {:,} rows have fewer than four references; a perfect answer stays below 100 there."


@dataclass(frozen=True)
class _Plan:
    """What is evaluated, and from what."""

    recipe: Recipe
    settings: Eval
    instructions: Manifest
    adapter: Manifest | None
    model: str
    limit: int | None
    offline: bool

    @property
    def revision(self) -> str | None:
        return self.recipe.model.revision if self.recipe.model else None


def evaluate(
    recipe: Recipe,
    *,
    force: bool = False,
    dry_run: bool = False,
    limit: int | None = None,
    offline: bool = False,
    console: Talk,
) -> dict[str, Any]:
    """Lets every model answer the same held-out rows and writes report/; returns the result document.

    Raises:
        DataError: instructions/ or adapter/ is missing, or no row can be asked.
        RecipeError: A metric is unknown.
        GateError: A score is below ``eval.fail_under``; the report is published first.
        Interrupted: A signal came; nothing was written.
    """
    plan = _plan(recipe, limit, offline or bool(os.environ.get("HF_HUB_OFFLINE")))
    config = {
        "eval": plan.settings.model_dump(mode="json", exclude={"fail_under"}),
        "tokenize": recipe.tokenize.model_dump(mode="json", exclude={"workers", "layout"}),
        "model": plan.model,
        "revision": plan.revision,
        "seed": recipe.seed,
        "limit": plan.limit,
        "description": recipe.description,
    }
    parents = {"instructions": plan.instructions.hash}
    if plan.adapter is not None:
        parents["adapter"] = plan.adapter.hash
    target = recipe.run_dir / "report"
    if dry_run:
        rows = plan.instructions.rows[plan.settings.split]
        return {"stage": "eval", "dry_run": True, "target": str(target), "rows": rows, "config": config}
    staging = open_stage(target, stage="eval", config=config, parents=parents, force=force)
    if staging is None:
        console.say(f"eval: {target} is up to date (same rows, same models); nothing to do")
        report = json.loads((target / "metrics.json").read_text("utf-8"))
    else:
        with staging:
            for reason in staging.reasons:
                console.say(f"eval: again, {reason}")
            report = _write(plan, staging, console)
    return _finish(plan, report, target, console, cached=staging is None)


def _plan(recipe: Recipe, limit: int | None, offline: bool) -> _Plan:
    """Checks everything that can be checked before a model is loaded."""
    from mmtune.evaluation import check_metric

    settings = recipe.eval or Eval()
    for name in (*(() if settings.metrics == "auto" else settings.metrics), *settings.fail_under):
        check_metric(name)
    instructions = read_manifest(recipe.run_dir / "instructions", made_by="build-data")
    if not instructions.rows.get(settings.split):
        have = ", ".join(f"{split} ({count:,})" for split, count in instructions.rows.items() if count)
        raise DataError(
            f"instructions/ has no rows in the split {settings.split!r}; it has {have or 'none'}",
            f"set eval.split, or add a source with `split: {settings.split}` and run: mmtune build-data",
            "split_missing",
        )
    adapter = None
    if "tuned" in settings.compare:
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
    return _Plan(recipe, settings, instructions, adapter, made_from or asked, min(least, default=None), offline)


def _write(plan: _Plan, staging: Staging, console: Talk) -> dict[str, Any]:
    from mmtune.encoding.render import Renderer
    from mmtune.evaluation.comparison import compare, perplexities
    from mmtune.evaluation.rows import ChosenExamples, EvalRows
    from mmtune.prompts.schema import row_to_example

    recipe, settings, tokenize = plan.recipe, plan.settings, plan.recipe.tokenize
    processor = _processor(plan)
    table = open_split(recipe.run_dir / "instructions" / settings.split)
    examples = ChosenExamples(table.to_batches(), row_to_example, plan.limit)
    rows = EvalRows(
        len(examples),
        examples,
        Renderer(processor, video_frames=tokenize.video_frames),
        max_length=tokenize.max_length,
        drop_turns=tokenize.too_long == "drop_turns",
    )
    scored = _scored(rows, settings, len(examples), console)
    with RejectLog(staging.path / "rejects.jsonl") as log:
        for reject in rows.rejects:
            log.write(reject)
    if not scored:
        raise DataError(f"no row can be asked: {log.counts}", "look at tokenize.max_length and the model", "no_rows")
    texts, losses = _answers(plan, processor, rows, console)
    sure = {"resamples": settings.bootstrap, "seed": recipe.seed}
    found = compare(scored, texts, **sure)
    few = sum("vqa_accuracy" in row.metrics and 0 < len(row.references) < 4 for row in scored)
    report = {
        "schema": SCHEMA,
        "run": _run_facts(plan),
        "read": len(examples),
        "n": len(scored),
        "rejected": log.counts,
        "metrics": found.metrics,
        "groups": found.groups,
        "perplexity": perplexities(losses, [row.group for row in scored], **sure) if losses else None,
        "training": _training_facts(plan),
        "manifests": _chain(recipe.run_dir),
        "notes": [_FEW_REFERENCES.format(few)] if few else [],
    }
    _write_predictions(staging.path, scored, rows, examples, texts, found.per_row)
    samples = _samples(plan, scored, rows, examples, texts, found.per_row, found.metrics)
    _write_report(plan, staging.path, report, samples)
    staging.publish(rows={settings.split: len(scored)}, drops=log.counts, facts=_manifest_facts(plan, found.metrics))
    return report


def _processor(plan: _Plan) -> Any:
    """Returns the processor as tokenize uses it, its image size set to the recipe's pixel budget."""
    from mmtune.encoding.processor import load_processor

    processor = load_processor(plan.model, revision=plan.revision, offline=plan.offline)
    low, high = plan.recipe.tokenize.min_image_pixels, plan.recipe.tokenize.max_image_pixels
    images = getattr(processor, "image_processor", None)
    if images is not None and (low or high):
        size = dict(images.size)
        kept = {"shortest_edge": low or size.get("shortest_edge"), "longest_edge": high or size.get("longest_edge")}
        images.size = kept if isinstance(images.size, dict) else type(images.size)(**kept)
    return processor


def _scored(rows: Any, settings: Eval, total: int, console: Talk) -> list[Any]:
    """Encodes every example once; returns what scoring needs of those that fit."""
    from mmtune.evaluation.rows import scored_row

    chosen = None if settings.metrics == "auto" else settings.metrics
    scored = []
    with console.progress(total, "eval encode") as bar:
        for example in rows.examine():
            bar.advance(1)
            if example is not None:
                scored.append(scored_row(example, chosen))
    return scored


def _answers(
    plan: _Plan, processor: Any, rows: Any, console: Talk
) -> tuple[dict[str, list[str]], dict[str, tuple[Any, Any]]]:
    """Returns every model's answers, and the losses on the reference answers when they are asked for."""
    from mmtune.evaluation.generation import Stopped
    from mmtune.training.signals import StopFlag

    texts: dict[str, list[str]] = {}
    losses: dict[str, tuple[Any, Any]] = {}
    with StopFlag() as stop:
        try:
            for name in plan.settings.compare:
                model = _load(plan, name)
                texts[name], found = _ask(plan, name, model, processor, rows, stop, console)
                if found is not None:
                    losses[name] = found
                del model
                _free_memory()
        except Stopped as stopped:
            error = Interrupted("eval was stopped by a signal; report/ was not touched", "run the same command again")
            error.exit_code = 130 if stop.wanted == 2 else 75
            raise error from stopped
    return texts, losses


def _ask(
    plan: _Plan, name: str, model: Any, processor: Any, rows: Any, stop: Any, console: Talk
) -> tuple[list[str], tuple[Any, Any] | None]:
    from mmtune.encoding.collate import Collator
    from mmtune.encoding.processor import pad_token_id, tokenizer_of
    from mmtune.evaluation.generation import answer_losses, generate_texts, stop_ids

    settings, root = plan.settings, Path(plan.instructions.facts["media_root"])
    tokenizer = tokenizer_of(processor)
    shared: dict[str, Any] = {"batch_rows": settings.batch_rows, "should_stop": lambda: bool(stop)}
    with console.progress(len(rows.kept), f"eval {name}") as bar:
        texts = generate_texts(
            model,
            tokenizer,
            rows.prompts,
            Collator(processor, media_root=root, left=True, cache_bytes=_CACHE_BYTES),
            sizes=rows.prompt_sizes,
            stops=stop_ids(model, tokenizer, rows.conversations(range(min(32, len(rows.kept))))),
            pad_id=pad_token_id(processor),
            max_new_tokens=settings.max_new_tokens,
            advance=bar.advance,
            **shared,
        )
    if not settings.loss:
        return texts, None
    with console.progress(len(rows.kept), f"eval {name} loss") as bar:
        collate = Collator(processor, media_root=root, cache_bytes=_CACHE_BYTES)
        return texts, answer_losses(
            model, rows.conversations, collate, sizes=rows.row_sizes, advance=bar.advance, **shared
        )


def _load(plan: _Plan, name: str) -> Any:
    import torch

    from mmtune.models.load import load_model, load_tuned

    precision = plan.recipe.finetune.precision if plan.recipe.finetune else "auto"
    on_gpu = torch.cuda.is_available()
    bf16 = precision == "bf16" or (precision == "auto" and on_gpu and torch.cuda.is_bf16_supported())
    settings: dict[str, Any] = {
        "revision": plan.revision,
        "dtype": torch.bfloat16 if bf16 else torch.float32,
        "attn": plan.recipe.model.attn if plan.recipe.model else "auto",
        "offline": plan.offline,
    }
    folder = plan.recipe.run_dir / "adapter"
    model: Any = load_model(plan.model, **settings) if name == "base" else load_tuned(plan.model, folder, **settings)
    return model.to("cuda") if on_gpu else model


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _manifest_facts(plan: _Plan, metrics: Mapping[str, Any]) -> dict[str, Any]:
    scores = {
        name: {model: found["value"] for model, found in entry["models"].items()} for name, entry in metrics.items()
    }
    return {"model": plan.model, "scores": scores}


def _run_facts(plan: _Plan) -> dict[str, Any]:
    settings, recipe = plan.settings, plan.recipe
    return {
        "title": recipe.description.strip().split("\n")[0].rstrip(".") or recipe.run_dir.name,
        "model": plan.model,
        "split": settings.split,
        "compare": list(settings.compare),
        "max_new_tokens": settings.max_new_tokens,
        "bootstrap": settings.bootstrap,
        "seed": recipe.seed,
    }


def _training_facts(plan: _Plan) -> dict[str, Any] | None:
    from mmtune.reports.facts import training_facts

    if plan.adapter is None:
        return None
    settings, made = plan.adapter.config.get("finetune", {}), plan.adapter
    return training_facts(settings, made.facts, made.rows.get("train", 0), made.timings.get("total_seconds"))


def _chain(run_dir: Path) -> list[dict[str, Any]]:
    """Returns what every finished stage before this one says of itself."""
    found = []
    for name in ("instructions", "tokens", "adapter"):
        if is_finished(run_dir / name):
            made = read_manifest(run_dir / name)
            seconds = made.timings.get("total_seconds", 0.0)
            kept = {"stage": made.stage, "folder": name, "hash": made.hash, "rows": made.rows, "drops": made.drops}
            found.append({**kept, "seconds": seconds, "parents": made.parents, "mmtune": made.mmtune_version})
    return found


def _write_predictions(
    folder: Path,
    scored: Sequence[Any],
    rows: Any,
    examples: Any,
    texts: Mapping[str, Sequence[str]],
    per_row: Mapping[str, Sequence[Mapping[str, float]]],
) -> None:
    from mmtune.evaluation.comparison import predictions_of
    from mmtune.evaluation.rows import question_of

    with open(folder / "predictions.jsonl", "w", encoding="utf-8", errors="backslashreplace") as handle:
        for at, row in enumerate(scored):
            prompt = question_of(examples(rows.kept[at]))
            for found in predictions_of(row, prompt, {model: given[at] for model, given in texts.items()}):
                line = {**asdict(found), "source": row.source, "scores": per_row[found.model][at]}
                handle.write(json.dumps(line, ensure_ascii=False) + "\n")


def _samples(
    plan: _Plan,
    scored: Sequence[Any],
    rows: Any,
    examples: Any,
    texts: Mapping[str, Sequence[str]],
    per_row: Mapping[str, Sequence[Mapping[str, float]]],
    metrics: Mapping[str, Any],
) -> list[Any]:
    from mmtune.evaluation.rows import question_of
    from mmtune.reports.samples import Shown, choose_rows, make_sample

    root = Path(plan.instructions.facts["media_root"])
    shown = []
    for at, row in enumerate(scored):
        name = row.metrics[0] if row.metrics else ""
        values = tuple(per_row[model][at].get(name) for model in texts)
        better = metrics.get(name, {}).get("higher_is_better", True)
        shown.append(Shown(row.id, row.group, name, values, better, row.references))
    samples = []
    for kind, numbers in choose_rows(shown, seed=plan.recipe.seed).items():
        for at in numbers:
            example = examples(rows.kept[at])
            answers = {model: given[at] for model, given in texts.items()}
            samples.append(make_sample(shown[at], kind, question_of(example), example.media, answers, root))
    return samples


def _write_report(plan: _Plan, folder: Path, report: Mapping[str, Any], samples: Sequence[Any]) -> None:
    from mmtune.reports.markdown import write_markdown
    from mmtune.reports.page import write_page

    log = plan.recipe.run_dir / "adapter" / "metrics.jsonl"
    lines = log.read_text("utf-8").splitlines() if plan.adapter is not None and log.is_file() else []
    losses = [json.loads(line) for line in lines if line.strip()]
    write_json(folder / "metrics.json", report)
    (folder / "report.md").write_text(write_markdown(report), "utf-8")
    (folder / "index.html").write_text(write_page(report, samples, losses), "utf-8", errors="backslashreplace")


def _finish(plan: _Plan, report: Mapping[str, Any], target: Path, console: Talk, *, cached: bool) -> dict[str, Any]:
    """Prints the table and checks the gates; returns the result document."""
    from mmtune.evaluation.comparison import failed_gates
    from mmtune.reports.wording import headline, table_rows

    head, rows = table_rows(report)
    console.table(f"{plan.settings.split}, {report['n']:,} rows", head, rows)
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
    }
    judged = plan.settings.compare[-1]
    missed = failed_gates(report["metrics"], judged, plan.settings.fail_under)
    if missed:
        raise GateError("; ".join(missed), f"the report is written: {page}", "gate")
    return result
