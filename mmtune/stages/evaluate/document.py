"""The files of report/: the document with all numbers, the predictions, and what a person opens."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmtune.evaluation.comparison import AnsweredRow, Comparison, ScoredRow, answered_rows, compare, perplexities
from mmtune.evaluation.looking import looked_report
from mmtune.evaluation.pairs import Answerer, leading_pair, pairs_of
from mmtune.evaluation.reach import beside_options
from mmtune.evaluation.sameness import alike
from mmtune.reports.facts import training_facts
from mmtune.reports.folder import write_report
from mmtune.reports.samples import Sample, Shown, choose_rows, make_sample
from mmtune.stages.evaluate.answerers import answerers_of
from mmtune.stages.evaluate.answers import Answers
from mmtune.stages.evaluate.plan import SCHEMA, Plan
from mmtune.stages.evaluate.questions import Questions
from mmtune.storage import Manifest, Staging, is_finished, read_manifest

_CHAIN = ("features", "instructions", "prompt", "start", "tokens", "base", "adapter")


def write_stage(
    plan: Plan, questions: Questions, answers: Answers, free: Sequence[str], staging: Staging
) -> dict[str, Any]:
    """Scores the answers and publishes report/; returns the document of ``metrics.json``.

    Args:
        plan: What is evaluated.
        questions: What was asked.
        answers: Of every answerer.
        free: What ``freely_answered`` says.
        staging: Of report/.
    """
    answerers = answerers_of(answers.texts, questions.asked.facts, _members(plan, questions))
    resamples, seed = plan.settings.bootstrap, plan.recipe.seed
    pairs = pairs_of(answerers)
    found = compare(questions.scored, answers.texts, pairs=pairs, resamples=resamples, seed=seed)
    report = _document(plan, questions, answers, free, answerers, found)
    answered = answered_rows(questions.scored, answers.texts, found)
    _write_predictions(staging.path, answered, questions)
    log = plan.recipe.run_dir / "adapter" / "metrics.jsonl" if plan.adapter is not None else None
    write_report(staging.path, report, _samples(plan, answered, questions, report), log)
    rows: dict[str, int] = {plan.settings.split: len(questions.scored)}
    staging.publish(rows=rows, drops=questions.rejected, facts=_manifest_facts(plan, found.metrics))
    return report


def _members(plan: Plan, questions: Questions) -> list[str]:
    """Returns the ways that are members of an ensemble."""
    return [*(questions.worded.rows if questions.worded else ()), *(member.name for member in plan.members)]


def _without(members: Collection[str], groups: Mapping[str, Any]) -> dict[str, Any]:
    """Returns scores by group; by the template of a row, members of an ensemble have none: they ask it in another."""
    by_template = {
        value: {
            name: {**entry, "models": {who: one for who, one in entry["models"].items() if _way(who) not in members}}
            for name, entry in found.items()
        }
        for value, found in groups.get("template", {}).items()
    }
    return {**groups, "template": by_template} if by_template else dict(groups)


def _way(answerer: str) -> str:
    return answerer.partition(", ")[2]


def _document(
    plan: Plan,
    questions: Questions,
    answers: Answers,
    free: Sequence[str],
    answerers: Sequence[Answerer],
    found: Comparison,
) -> dict[str, Any]:
    sure = {"resamples": plan.settings.bootstrap, "seed": plan.recipe.seed}
    texts, losses, looked, scored = answers.texts, answers.losses, answers.looked, questions.scored
    seen = looked_report(looked.found, scored, texts, losses, ablated=looked.judged, kinds=plan.settings.ablate, **sure)
    return {
        "schema": SCHEMA,
        "run": {**_run_facts(plan, scored), "compare": list(texts), "pair": leading_pair(answerers)},
        "exemplars": questions.asked.facts,
        "read": questions.read,
        "n": len(scored),
        "rejected": questions.rejected,
        "metrics": found.metrics,
        "groups": _without(_members(plan, questions), found.groups),
        "perplexity": perplexities(losses, [row.group for row in scored], **sure) if losses else None,
        **seen,
        "alike": alike(scored, texts),
        "filling": answers.filling,
        "training": _training_facts(plan),
        "manifests": _chain(plan),
        "notes": [*plan.notes, *questions.notes(), *answers.learned, *free],
    }


def freely_answered(plan: Plan, questions: Questions, answers: Answers) -> list[str]:
    """Returns what there is to say of answers in a model's own words where rows have options."""
    return beside_options(questions.scored, answers.texts) if plan.settings.answer == "generate" else []


def _manifest_facts(plan: Plan, metrics: Mapping[str, Any]) -> dict[str, Any]:
    scores = {
        name: {model: found["value"] for model, found in entry["models"].items()} for name, entry in metrics.items()
    }
    return {"model": plan.model, "scores": scores}


def _run_facts(plan: Plan, scored: Sequence[ScoredRow]) -> dict[str, Any]:
    settings, recipe = plan.settings, plan.recipe
    free = settings.answer == "generate"
    return {
        "title": recipe.description.strip().split("\n")[0].rstrip(".") or recipe.run_dir.name,
        "model": plan.model,
        "split": settings.split,
        "split_rows": plan.instructions.rows[settings.split],
        "answer": settings.answer,
        "with_options": 0 if free else sum(bool(row.options) for row in scored),
        "max_new_tokens": settings.max_new_tokens,
        "bootstrap": settings.bootstrap,
        "seed": recipe.seed,
    }


def _training_facts(plan: Plan) -> dict[str, Any] | None:
    if plan.adapter is None:
        return None
    settings, made = plan.adapter.config.get("finetune", {}), plan.adapter
    return training_facts(settings, made.facts, made.rows.get("train", 0), made.timings.get("total_seconds"))


def _chain(plan: Plan) -> list[dict[str, Any]]:
    """Returns what every stage that the report was made from says of itself, in the order of a run."""
    run_dir = plan.recipe.run_dir
    made = {name: read_manifest(run_dir / name) for name in _CHAIN if is_finished(run_dir / name)}
    read = [one for one in (plan.instructions, plan.features, plan.prompt, plan.adapter) if one is not None]
    if Path(plan.model) == run_dir / "base" and "base" in made:
        read.append(made["base"])
    hashes: set[str] = set()
    while read:
        one = read.pop()
        hashes.add(one.hash)
        read += [other for other in made.values() if other.hash in one.parents.values()]
    return [_said_of_itself(name, one) for name, one in made.items() if one.hash in hashes]


def _said_of_itself(name: str, made: Manifest) -> dict[str, Any]:
    return {
        "stage": made.stage,
        "folder": name,
        "hash": made.hash,
        "rows": made.rows,
        **({"examples": made.facts["examples"]} if "examples" in made.facts else {}),
        "drops": made.drops,
        "seconds": made.timings.get("total_seconds", 0.0),
        "parents": made.parents,
        "mmtune": made.mmtune_version,
    }


def _write_predictions(folder: Path, answered: Sequence[AnsweredRow], questions: Questions) -> None:
    ways = questions.asked.rows
    with open(folder / "predictions.jsonl", "w", encoding="utf-8", errors="backslashreplace") as handle:
        for at, given in enumerate(answered):
            for found in given.predictions({name: questions.prompt_to(name, at) for name in given.answers}):
                line = {**asdict(found), "source": given.row.source, "scores": given.scores[found.model]}
                way = _way(found.model)
                if way in ways and way:
                    line["exemplar_ids"] = list(ways[way].example(at).exemplar_ids)
                handle.write(json.dumps(line, ensure_ascii=False) + "\n")


def _samples(
    plan: Plan, answered: Sequence[AnsweredRow], questions: Questions, report: Mapping[str, Any]
) -> list[Sample]:
    root = Path(plan.instructions.facts["media_root"])
    members = _members(plan, questions)
    metrics, names = report["metrics"], [one for one in report["run"]["compare"] if _way(one) not in members]
    compared = tuple(names.index(name) for name in report["run"]["pair"] or names[-1:])
    shown = []
    for given in answered:
        name = given.leading_metric
        values = tuple(given.scores[who].get(name) for who in names)
        better = metrics.get(name, {}).get("higher_is_better", True)
        shown.append(Shown(given.row.id, given.row.group, name, values, better, given.row.references, compared))
    samples = []
    for kind, numbers in choose_rows(shown, seed=plan.recipe.seed).items():
        for at in numbers:
            media, asked = questions.rows.example(at).media, questions.question(at)
            said = {who: answered[at].answers[who] for who in names}
            samples.append(make_sample(shown[at], kind, asked, media, said, root))
    return samples
