"""eval: models and instructions/ to report/. Wiring only; the numbers are made in ``evaluation``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmtune.errors import DataError, GateError, IntegrityError, Interrupted, RecipeError
from mmtune.models.digest import weights_digest
from mmtune.recipe import Eval, Recipe
from mmtune.stages.evaluate.filling import filling_of
from mmtune.stages.evaluate.prompted import adapter_of, in_order, is_prompted, prompt_of, prompted_rows
from mmtune.stages.evaluate.saying import notes_of, said_of_fewer
from mmtune.stages.evaluate.shots import asked_rows, features_of
from mmtune.storage import Manifest, RejectLog, Staging, foresee, is_finished, open_split, open_stage, read_manifest
from mmtune.talk import Talk

SCHEMA = "mmtune.report/1"
_FEW_REFERENCES = "VQA accuracy: {:,} rows have fewer than four references; a perfect answer stays below 100 there."


@dataclass(frozen=True)
class _Plan:
    """What is evaluated, and from what."""

    recipe: Recipe
    settings: Eval
    instructions: Manifest
    adapter: Manifest | None
    features: Manifest | None
    prompt: Manifest | None
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
        RecipeError: A metric is unknown, or a bar is no score of 100.
        GateError: A score is below ``eval.fail_under``; the report is published first.
        Interrupted: A signal came; nothing was written.
    """
    plan = _plan(recipe, limit, offline)
    config = {
        "eval": plan.settings.model_dump(mode="json", exclude={"fail_under"}),
        "tokenize": recipe.tokenize.model_dump(mode="json", exclude={"workers", "layout"}),
        "model": plan.model,
        "weights": weights_digest(plan.model, revision=plan.revision, offline=plan.offline),
        "revision": plan.revision,
        "seed": recipe.seed,
        "limit": plan.limit,
        "description": recipe.description,
    }
    parents = {"instructions": plan.instructions.hash}
    if plan.adapter is not None:
        parents["adapter"] = plan.adapter.hash
    if plan.features is not None:
        parents["features"] = plan.features.hash
    if plan.prompt is not None:
        parents["prompt"] = plan.prompt.hash
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


def _plan(recipe: Recipe, limit: int | None, offline: bool) -> _Plan:
    """Checks everything that can be checked before a model is loaded."""
    from mmtune.evaluation import check_metric
    from mmtune.evaluation.comparison import check_bars

    settings = recipe.eval or Eval()
    for name in () if settings.metrics == "auto" else settings.metrics:
        check_metric(name)
    check_bars(settings.fail_under)
    instructions = read_manifest(recipe.run_dir / "instructions", made_by="build-data")
    if not instructions.rows.get(settings.split):
        have = ", ".join(f"{split} ({count:,})" for split, count in instructions.rows.items() if count)
        raise DataError(
            f"instructions/ has no rows in the split {settings.split!r}; it has {have or 'none'}",
            f"set eval.split, or add a source with `split: {settings.split}` and run: mmtune build-data",
            "split_missing",
        )
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
    return _Plan(recipe, settings, instructions, adapter, features, prompt, model, most, offline)


def _write(plan: _Plan, staging: Staging, console: Talk) -> dict[str, Any]:
    from mmtune.encoding.processor import load_processor
    from mmtune.encoding.render import Renderer
    from mmtune.evaluation.asking import answerer
    from mmtune.evaluation.comparison import answered_rows, compare, perplexities
    from mmtune.evaluation.looking import looked_report
    from mmtune.evaluation.rows import ChosenExamples, EvalRows, no_context
    from mmtune.prompts.schema import row_to_example
    from mmtune.prompts.searched import shortenable
    from mmtune.reports.folder import write_report
    from mmtune.reports.wording import steps

    recipe, settings, tokenize = plan.recipe, plan.settings, plan.recipe.tokenize
    processor = load_processor(
        plan.model,
        revision=plan.revision,
        offline=plan.offline,
        min_image_pixels=tokenize.min_image_pixels,
        max_image_pixels=tokenize.max_image_pixels,
    )
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
    scored = _scored(rows, settings, len(examples), console)
    with RejectLog(staging.path / "rejects.jsonl") as log:
        for reject in rows.rejects:
            log.write(reject)
    if not scored:
        raise DataError(f"no row can be asked: {log.counts}", "look at tokenize.max_length and the model", "no_rows")
    asked = asked_rows(recipe, settings, rows, make, plan.instructions, plan.features)
    for line in said_of_fewer(asked.facts, len(scored)):
        console.note(line)
    prompted = prompted_rows(recipe, rows, make, plan.instructions) if plan.prompt is not None else None
    texts, losses, looked, filling = _answers(plan, processor, rows, asked.rows, prompted, console)
    texts = {**{answerer("vote", way): said for way, said in asked.votes.items()}, **texts}
    sure = {"resamples": settings.bootstrap, "seed": recipe.seed}
    found = compare(scored, texts, **sure)
    few = sum("vqa_accuracy" in row.metrics and 0 < len(row.references) < 4 for row in scored)
    notes = [*([_FEW_REFERENCES.format(few)] if few else []), *(prompted.notes() if prompted else [])]
    notes += (
        [f"The contexts of {cut:,} rows were cut to fit tokenize.max_length."] if (cut := sum(rows.shortened)) else []
    )
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "run": {**_run_facts(plan), "compare": list(texts)},
        "exemplars": asked.facts,
        "read": len(examples),
        "n": len(scored),
        "rejected": log.counts,
        "metrics": found.metrics,
        "groups": found.groups,
        "perplexity": perplexities(losses, [row.group for row in scored], **sure) if losses else None,
        **looked_report(looked.found, scored, texts, losses, ablated=looked.judged, kinds=settings.ablate, **sure),
        "filling": filling,
        "training": _training_facts(plan),
        "manifests": _chain(recipe.run_dir),
        "notes": [*notes, *notes_of(asked.facts, len(scored))],
    }
    report["notes"] += steps(report)
    answered = answered_rows(scored, texts, found)
    _write_predictions(staging.path, answered, rows, asked.rows)
    samples = _samples(plan, answered, rows, found.metrics)
    training_log = recipe.run_dir / "adapter" / "metrics.jsonl" if plan.adapter is not None else None
    write_report(staging.path, report, samples, training_log)
    staging.publish(rows={settings.split: len(scored)}, drops=log.counts, facts=_manifest_facts(plan, found.metrics))
    return report


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
    plan: _Plan, processor: Any, rows: Any, ways: Mapping[str, Any], prompted: Any, console: Talk
) -> tuple[dict[str, list[str]], dict[str, tuple[Any, Any]], Any, list[dict[str, Any]] | None]:
    """Returns every model's answers, its losses on the references when they are asked for, what else was seen, and how
    well generators fill in what is missing.
    """
    from mmtune.evaluation.asking import Asking, ask_each
    from mmtune.evaluation.generation import Stopped
    from mmtune.evaluation.looking import Looking
    from mmtune.evaluation.ranking import label_words
    from mmtune.training.signals import StopFlag

    settings = plan.settings
    models: dict[str, Any] = {name: partial(_load, plan, name) for name in settings.compare}
    with StopFlag() as stop:
        asking = Asking(
            media_root=Path(plan.instructions.facts["media_root"]),
            batch_rows=settings.batch_rows,
            max_new_tokens=settings.max_new_tokens,
            loss=settings.loss,
            rank=settings.answer == "rank",
            words=label_words(plan.instructions.config["sources"]),
            should_stop=lambda: bool(stop),
            progress=console.progress,
            note=console.note,
        )
        try:
            plain = {name: load for name, load in models.items() if not is_prompted(name)}
            looking = Looking(processor, ways, asking, settings.ablate, list(plain)[-1:], plan.recipe.seed)
            texts, losses = ask_each(plain, processor, ways, asking, looking)
            if prompted is not None:
                asked = {name: load for name, load in models.items() if is_prompted(name)}
                said, more = ask_each(asked, processor, {"": prompted.rows}, prompted.asking(asking))
                texts |= {name: prompted.answers(answers) for name, answers in said.items()}
                # Label words are other texts than the references: their losses say nothing beside those.
                losses |= {} if prompted.unaskable or prompted.prompt.words else more
            filling = None
            if "modality" in settings.ablate:
                filling = filling_of(partial(_load, plan, "base"), Path(plan.model), processor, rows, asking)
            return in_order(texts, settings.compare), in_order(losses, settings.compare), looking, filling
        except Stopped as stopped:
            error = Interrupted("eval was stopped by a signal; report/ was not touched", "run the same command again")
            error.exit_code = 130 if stop.wanted == 2 else 75
            raise error from stopped


def _load(plan: _Plan, name: str) -> Any:
    from mmtune.models.load import load_to_answer

    recipe = plan.recipe
    return load_to_answer(
        plan.model,
        adapter_of(recipe, name, plan.prompt),
        precision=recipe.finetune.precision if recipe.finetune else "auto",
        revision=plan.revision,
        attn=recipe.model.attn if recipe.model else "auto",
        offline=plan.offline,
        # What was tuned on 4-bit weights is scored on them, and so is what it is compared with.
        nf4=plan.adapter is not None and plan.adapter.config["finetune"].get("quantize") == "nf4",
    )


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
    for name in ("instructions", "prompt", "tokens", "adapter"):
        if is_finished(run_dir / name):
            made = read_manifest(run_dir / name)
            seconds = made.timings.get("total_seconds", 0.0)
            kept = {"stage": made.stage, "folder": name, "hash": made.hash, "rows": made.rows, "drops": made.drops}
            found.append({**kept, "seconds": seconds, "parents": made.parents, "mmtune": made.mmtune_version})
    return found


def _write_predictions(folder: Path, answered: Sequence[Any], rows: Any, ways: Mapping[str, Any]) -> None:
    from mmtune.evaluation.rows import question_of

    with open(folder / "predictions.jsonl", "w", encoding="utf-8", errors="backslashreplace") as handle:
        for at, given in enumerate(answered):
            for found in given.predictions(question_of(rows.example(at))):
                line = {**asdict(found), "source": given.row.source, "scores": given.scores[found.model]}
                way = found.model.partition(", ")[2]
                if way:
                    line["exemplar_ids"] = list(ways[way].example(at).exemplar_ids)
                handle.write(json.dumps(line, ensure_ascii=False) + "\n")


def _samples(plan: _Plan, answered: Sequence[Any], rows: Any, metrics: Mapping[str, Any]) -> list[Any]:
    from mmtune.evaluation.rows import question_of
    from mmtune.reports.samples import Shown, choose_rows, make_sample

    root = Path(plan.instructions.facts["media_root"])
    shown = []
    for given in answered:
        name = given.leading_metric
        values = tuple(scores.get(name) for scores in given.scores.values())
        better = metrics.get(name, {}).get("higher_is_better", True)
        shown.append(Shown(given.row.id, given.row.group, name, values, better, given.row.references))
    samples = []
    for kind, numbers in choose_rows(shown, seed=plan.recipe.seed).items():
        for at in numbers:
            example = rows.example(at)
            question = question_of(example)
            samples.append(make_sample(shown[at], kind, question, example.media, answered[at].answers, root))
    return samples


def _finish(plan: _Plan, report: Mapping[str, Any], target: Path, console: Talk, *, cached: bool) -> dict[str, Any]:
    """Prints the table and checks the gates; returns the result document."""
    from mmtune.evaluation.comparison import failed_gates
    from mmtune.reports.extras import extra_tables
    from mmtune.reports.wording import headline, steps, table_rows

    head, rows = table_rows(report)
    console.table(f"{plan.settings.split}, {report['n']:,} rows", head, rows)
    for extra in extra_tables(report):
        console.table(extra.title, extra.head, extra.rows)
    console.say(f"eval: {headline(report)}")
    for line in steps(report):
        console.say(f"eval: {line}")
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
