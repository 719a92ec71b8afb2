"""The models of eval asked, one after the other: answers, losses, and what was seen beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mmtune.errors import Interrupted, RecipeError
from mmtune.evaluation.ablation import idle_kinds, row_facts
from mmtune.evaluation.asking import Asking, Losses, ask_each
from mmtune.evaluation.generation import Stopped
from mmtune.evaluation.looking import Looking
from mmtune.evaluation.pairs import answerer
from mmtune.evaluation.ranking import label_words
from mmtune.models.composite.scores import branches_of_config
from mmtune.models.load import load_config, load_to_answer
from mmtune.signals import exit_code_of
from mmtune.stages.evaluate.answerers import VOTE, in_order
from mmtune.stages.evaluate.ensemble import answers_in_wordings, answers_of_adapters
from mmtune.stages.evaluate.filling import filling_of
from mmtune.stages.evaluate.plan import Plan
from mmtune.stages.evaluate.prompted import adapter_of, is_prompted
from mmtune.stages.evaluate.questions import Questions
from mmtune.talk import Talk
from mmtune.training.signals import StopFlag


@dataclass(frozen=True)
class Answers:
    """What was answered, by model and way in the order of the report.

    Attributes:
        texts: Answers to the kept rows, the exemplars' own votes first.
        losses: On the references, where they were asked for.
        looked: What else was seen of each model.
        filling: How well generators fill in what is missing, or None.
        learned: What soft verbalizers learned, in sentences.
    """

    texts: Mapping[str, list[str]]
    losses: Mapping[str, Losses]
    looked: Looking
    filling: list[dict[str, Any]] | None
    learned: Sequence[str] = ()


def answers_of(plan: Plan, processor: Any, questions: Questions, console: Talk) -> Answers:
    """Returns what every model of ``eval.compare`` answers.

    Raises:
        Interrupted: A signal came.
        RecipeError: ``eval.ablate`` names only what no row and no model has.
    """
    _check_ablation(plan, questions, console)
    learned: list[str] = []

    def tell(line: str) -> None:
        learned.append(f"{line}.")
        console.say(f"eval: {line}")

    with StopFlag() as stop:
        asking = Asking(
            media_root=Path(plan.instructions.facts["media_root"]),
            batch_rows=plan.settings.batch_rows,
            max_new_tokens=plan.settings.max_new_tokens,
            loss=plan.settings.loss,
            rank=plan.settings.answer == "rank",
            solved=questions.solved,
            words=label_words(plan.instructions.config["sources"]),
            should_stop=lambda: bool(stop),
            progress=console.progress,
            note=console.note,
            learned=tell,
        )
        try:
            return replace(_answers(plan, processor, questions, asking), learned=learned)
        except Stopped as stopped:
            error = Interrupted("eval was stopped by a signal; report/ was not touched", "run the same command again")
            error.exit_code = exit_code_of(stop.wanted)
            raise error from stopped


def _check_ablation(plan: Plan, questions: Questions, console: Talk) -> None:
    """Says before anything is asked what of ``eval.ablate`` takes nothing away."""
    kinds = plan.settings.ablate
    if not kinds:
        return
    rows = list(questions.asked.rows.values())[-1]
    facts = [row_facts(rows.example(at)) for at in range(len(rows.kept))]
    config = load_config(plan.model, revision=plan.revision, offline=plan.offline)
    idle = idle_kinds(kinds, facts, branches_of_config(config))
    if len(idle) == len(kinds):
        said = "; ".join(f"{kind}: {why}" for kind, why in idle.items())
        raise RecipeError(f"eval.ablate takes nothing away: {said}", "leave eval.ablate out", "nothing_to_ablate")
    for kind, why in idle.items():
        console.note(f"eval.ablate: {kind} takes nothing away: {why}")


def _answers(plan: Plan, processor: Any, questions: Questions, asking: Asking) -> Answers:
    settings, ways, prompted = plan.settings, questions.asked.rows, questions.prompted
    models: dict[str, Any] = {name: partial(_load, plan, name) for name in settings.compare}
    # First: heads of another version end the run before anything was asked.
    filling = None
    if "modality" in settings.ablate:
        filling = filling_of(partial(_load, plan, "base"), Path(plan.model), processor, questions.rows, asking)
    plain = {name: load for name, load in models.items() if not is_prompted(name)}
    looking = Looking(processor, ways, asking, settings.ablate, list(plain)[-1:], plan.recipe.seed)
    members = {answerer("tuned", one.name): partial(_load, plan, "tuned", one.folder) for one in plan.members}
    further = {} if questions.worded is None else questions.worded.rows
    heard = ask_each({**plain, **members}, processor, ways, asking, looking, further)
    texts, losses = dict(heard.texts), dict(heard.losses)
    if questions.worded is not None:
        texts |= answers_in_wordings(heard, list(plain), questions.worded)
    if members:
        texts |= answers_of_adapters(heard, ["tuned", *members], questions.rows)
    if prompted is not None:
        asked = {name: load for name, load in models.items() if is_prompted(name)}
        more = ask_each(asked, processor, {"": prompted.rows}, prompted.asking(asking))
        texts |= {name: prompted.answers(answers) for name, answers in more.texts.items()}
        # Label words are other texts than the references: their losses say nothing beside those.
        losses |= {} if prompted.unaskable or prompted.prompt.words else more.losses
    votes = {answerer(VOTE, way): said for way, said in questions.asked.votes.items()}
    ordered = {**votes, **in_order(texts, settings.compare)}
    return Answers(ordered, in_order(losses, settings.compare), looking, filling)


def _load(plan: Plan, name: str, adapter: Path | None = None) -> Any:
    recipe = plan.recipe
    return load_to_answer(
        plan.model,
        adapter or adapter_of(recipe, name, plan.prompt),
        precision=recipe.finetune.precision if recipe.finetune else "auto",
        revision=plan.revision,
        attn=recipe.model.attn if recipe.model else "auto",
        offline=plan.offline,
        # What was tuned on 4-bit weights is scored on them, and so is what it is compared with.
        nf4=plan.adapter is not None and plan.adapter.config["finetune"].get("quantize") == "nf4",
    )
