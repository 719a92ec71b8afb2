"""One search from its settings to its document: what is searched, who proposes, who answers, what came out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mmtune.errors import CapabilityError, DataError, Interrupted, RecipeError
from mmtune.media.content import names_beside
from mmtune.models.tuned_from import Base
from mmtune.prompts.search import (
    METHODS,
    Budget,
    Candidate,
    Found,
    Method,
    Problem,
    Proposer,
    Scorer,
    Space,
    Trace,
    search,
)
from mmtune.prompts.search.bbt import SoftPrompt
from mmtune.prompts.search.chat_model import ChatModel
from mmtune.prompts.search.edits import Edits
from mmtune.prompts.search.llm import ChatProposer
from mmtune.prompts.searched import SCHEMA, SOFT, SearchedPrompt, prompt_facts
from mmtune.recipe import Eval, Prompt, Recipe
from mmtune.records import Example
from mmtune.stages.prompt.own import method_name, own_settings
from mmtune.stages.prompt.rows import Rows, answer_of, solved
from mmtune.storage import Manifest, read_manifest
from mmtune.talk import Talk

_LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Course:
    """What a search is made of.

    Attributes:
        recipe: The recipe.
        settings: Its ``prompt`` section.
        rows: Dev rows, exemplars, test rows.
        base: The base model.
        media_root: Of the rows.
        instructions: Manifest of the rows.
        offline: Never reach for the network.
    """

    recipe: Recipe
    settings: Prompt
    rows: Rows
    base: Base
    media_root: Path
    instructions: Manifest
    offline: bool

    @property
    def asked(self) -> Eval:
        """How rows are answered: as eval does."""
        return self.recipe.eval or Eval()

    @property
    def space(self) -> Space:
        """The prompts that may be tried."""
        settings = self.settings
        return Space(
            start=Candidate(settings.instruction),
            vary=frozenset(settings.space),
            exemplars=tuple(one.id for one in self.rows.pool) if "exemplars" in settings.space else (),
            shots=settings.shots if "exemplars" in settings.space else 0,
            verbalizers=1 + len(settings.verbalizers),
            slots=self.rows.slots,
            longest=settings.longest,
        )

    def prompt_of(self, candidate: Candidate | SoftPrompt) -> SearchedPrompt:
        """Returns a candidate complete, with its exemplars and label words."""
        if isinstance(candidate, SoftPrompt):
            return SearchedPrompt(self.settings.instruction, soft=candidate.z)
        by_id = {one.id: one for one in self.rows.pool}
        words = self.settings.verbalizers[candidate.verbalizer - 1] if candidate.verbalizer else {}
        return SearchedPrompt(candidate.instruction, tuple(by_id[name] for name in candidate.exemplars), words)

    def problem(self, proposer: Proposer, own: Any = None) -> Problem:
        """Returns the search as its method gets it, with settings that are this method's own."""
        return Problem(
            space=self.space,
            proposer=proposer,
            rows=len(self.rows.dev),
            seed=self.recipe.seed,
            population=self.settings.population,
            minibatch=self.settings.minibatch,
            feedback=tuple(solved(one) for one in self.rows.pool),
            settings=own,
        )

    def edits(self) -> Edits:
        """Returns the offline proposer."""
        return Edits(self.space, tuple(solved(one) for one in self.rows.pool))

    def proposer(self, trace: Trace) -> Proposer:
        """Returns the proposer that the recipe names."""
        llm = self.settings.llm
        if llm is None:
            return self.edits()
        key = os.environ.get(llm.key_env, "") if llm.key_env else ""
        chat = ChatModel(llm.url, llm.model, key, llm.timeout_seconds, llm.retries, llm.temperature)
        return ChatProposer(self.space, tuple(solved(one) for one in self.rows.pool), chat, trace)

    def check(self) -> None:
        """Raises what can be known before a model is loaded.

        Raises:
            RecipeError: The start is no prompt for these rows, a label is unknown, the reward does not fit, or the
                budget is too small.
            DataError: gepa has no rows whose mistakes it could look at.
            CapabilityError: A library is missing, or the chat model is not allowed or has no key.
        """
        from mmtune.stages.prompt.asking import check_reward

        _check_start(self.space)
        _check_words(self.settings, self.rows)
        check_reward(self.settings.reward, (*self.rows.dev, *_feedback(self.settings, self.rows)))
        _check_llm(self.settings, self.offline)
        name = method_name(self.settings)
        METHODS[name].check(self.problem(self.edits()), self.settings.budget, name)

    def plan(self) -> dict[str, Any]:
        """Returns what a dry run says."""
        settings = self.settings
        counts = {"dev": len(self.rows.dev), "pool": len(self.rows.pool), "test": len(self.rows.test)}
        calls = settings.budget * (2 if self._compares_random else 1)
        return {"method": settings.method, "rows": counts, "calls": calls, "slots": sorted(self.rows.slots)}

    @property
    def _compares_random(self) -> bool:
        return self.settings.compare_random and self.settings.method != "random"

    def run(self, asker: Any, kept: Path, identity: Mapping[str, Any], console: Talk) -> dict[str, Found]:
        """Returns what the method found as ``best``, and random search as ``random`` where it is compared."""
        trace = Trace(kept / "trace.jsonl", {**identity, "method": self.settings.method})
        name, budget = method_name(self.settings), self.settings.budget
        method, own = METHODS[name], own_settings(self, asker)
        problem = self.problem(self.proposer(trace), own)
        found = {"best": self._search(asker, name, method, trace, problem, budget, console)}
        if self._compares_random:
            trace = Trace(kept / "random.jsonl", {**identity, "method": "random"})
            problem, drawn = self.problem(self.edits(), own), METHODS["random"]
            drawn = drawn if method.random is None else replace(drawn, search=method.random)
            # A method that ended early is compared at what it spent; fewer calls than a first look takes are no search.
            equal = max(found["best"].calls, len(self.rows.dev) + drawn.least(problem))
            found["random"] = self._search(asker, "random", drawn, trace, problem, equal, console)
        return found

    def _search(
        self, asker: Any, name: str, method: Method, trace: Trace, problem: Problem, budget: int, console: Talk
    ) -> Found:
        reward, dev = self.settings.reward, self.rows.dev
        asked = (*dev, *self.rows.pool)
        last: list[tuple[str, ...]] = [()]

        def score(candidate: Candidate | SoftPrompt, rows: Any) -> Any:
            answered = asker.answered(self.prompt_of(candidate), [asked[row] for row in rows], reward)
            last[0] = answered.said
            return answered.rewards

        if trace.replayed:
            console.say(f"prompt: {name} goes on behind {trace.replayed:,} steps of the stopped search")
        try:
            with console.progress(budget, f"prompt {name}") as bar:
                scorer = Scorer(
                    score,
                    len(dev),
                    Budget(budget),
                    trace,
                    tell=lambda line: bar.advance(len(line["rows"]), _note(line)),
                    said=lambda candidate, rows: last[0],
                )
                return search(problem, scorer, method, name)
        finally:
            trace.close()


def _note(line: Mapping[str, Any]) -> str:
    return "" if line["best"] is None else f"best={line['best']:.4f}"


def follow(course: Course, kept: Path, identity: Mapping[str, Any], console: Talk) -> dict[str, Any]:
    """Returns the document of a search after running it, and scoring what it found on the test rows.

    Raises:
        Interrupted: A signal came; the trace stays.
    """
    from mmtune.evaluation.generation import Stopped
    from mmtune.stages.prompt.outcome import Scoring, say, scored
    from mmtune.training.signals import StopFlag

    with StopFlag() as stop:
        try:
            asker = _asker(course, lambda: bool(stop), console.note)
            found = course.run(asker, kept, identity, console)
            searched, soft = asker.calls, isinstance(found["best"].best.candidate, SoftPrompt)
            if soft:
                asker.save(found["best"].best.candidate.z, kept / SOFT)
            prompts = {"start": course.prompt_of(course.space.start)}
            prompts |= {name: course.prompt_of(one.best.candidate) for name, one in found.items()}
            splits = {"dev": course.rows.dev, "test": course.rows.test}
            told = scored(prompts, splits, asker, Scoring(course.asked.bootstrap, course.recipe.seed))
        except Stopped as stopped:
            error = Interrupted(
                "the prompt search was stopped by a signal; its trace is kept", "run the same command again to go on"
            )
            error.exit_code = 130 if stop.wanted == 2 else 75
            raise error from stopped
    calls = {
        "budget": course.settings.budget,
        "search": found["best"].calls,
        **({"random": found["random"].calls} if "random" in found else {}),
        "report": asker.calls - searched,
    }
    document = {**_document(course, found, prompts, told), "calls": calls, "soft": SOFT if soft else None}
    say(document, console)
    return document


def _document(
    course: Course, found: Mapping[str, Found], prompts: Mapping[str, SearchedPrompt], told: Mapping[str, Any]
) -> dict[str, Any]:
    from mmtune.stages.prompt.outcome import metric_names

    scores = told["scores"]["best"]
    return {
        "schema": SCHEMA,
        "method": course.settings.method,
        "space": list(course.settings.space),
        "model": course.base.path,
        "on": course.settings.on,
        "seed": course.recipe.seed,
        "reward": course.settings.reward,
        "metrics": metric_names(course.rows.test),
        "test_split": course.settings.test_split or course.asked.split,
        "prompt": prompt_facts(prompts["best"]),
        "changed": prompts["best"] != prompts["start"],
        "instructions": {name: one.instruction for name, one in prompts.items()},
        "media_root": str(course.media_root),
        "rewards": {"start": found["best"].start.score, **{name: one.best.score for name, one in found.items()}},
        **told,
        "gap_dev_test": round(scores["dev"]["value"] - scores["test"]["value"], 4),
        "tried": found["best"].tried,
        "refused": found["best"].refused,
    }


def _asker(course: Course, should_stop: Callable[[], bool], note: Callable[[str], None]) -> Any:
    from mmtune.encoding.processor import load_processor
    from mmtune.encoding.render import Renderer
    from mmtune.evaluation.ranking import label_words
    from mmtune.stages.prompt.asking import Asker

    recipe, tokenize, asked = course.recipe, course.recipe.tokenize, course.asked
    processor = load_processor(
        course.base.path,
        revision=course.base.revision,
        offline=course.offline,
        min_image_pixels=tokenize.min_image_pixels,
        max_image_pixels=tokenize.max_image_pixels,
    )
    asker = Asker(
        model=_model(course),
        processor=processor,
        renderer=Renderer(processor, video_frames=tokenize.video_frames),
        media_root=course.media_root,
        max_length=tokenize.max_length,
        drop_turns=tokenize.too_long == "drop_turns",
        shorten=tokenize.too_long == "shorten",
        max_new_tokens=asked.max_new_tokens,
        batch_rows=asked.batch_rows,
        rank=asked.answer == "rank",
        words=label_words(course.instructions.config["sources"]),
        should_stop=should_stop,
        note=note,
        name=names_beside(course.media_root, (medium for one in course.rows.pool for medium in one.media)),
    )
    if course.settings.method != "bbt":
        return asker
    from mmtune.stages.prompt.soft import soften

    return soften(asker, course.settings.bbt, recipe.seed, course.base.path)


def _model(course: Course) -> Any:
    from mmtune.models.load import load_to_answer

    recipe, tuned = course.recipe, course.settings.on == "tuned"
    folder = recipe.run_dir / "adapter"
    return load_to_answer(
        course.base.path,
        folder if tuned else None,
        precision=recipe.finetune.precision if recipe.finetune else "auto",
        revision=course.base.revision,
        attn=recipe.model.attn if recipe.model else "auto",
        offline=course.offline,
        # What was tuned on 4-bit weights is asked on them.
        nf4=tuned and read_manifest(folder).config["finetune"].get("quantize") == "nf4",
    )


def _check_start(space: Space) -> None:
    fault = space.fault(space.start)
    if fault:
        raise RecipeError(
            f"prompt.instruction {space.start.instruction!r} is refused: {fault}",
            f"slots that every row has: {', '.join(sorted(space.slots))}; at most {space.longest} characters",
            fault,
        )


def _feedback(settings: Prompt, rows: Rows) -> tuple[Example, ...]:
    """Returns the rows beside the dev rows that a method scores prompts on."""
    if settings.method != "gepa":
        return ()
    if not rows.pool:
        raise DataError(
            "prompt.method gepa looks at the mistakes of training rows beside the dev rows, and there are none",
            "lower prompt.dev, add training rows, or take another method",
            "no_rows",
        )
    return rows.pool


def _check_words(settings: Prompt, rows: Rows) -> None:
    known = {text for one in (*rows.dev, *rows.test) for text in (*one.options, *one.references, answer_of(one))}
    for words in settings.verbalizers:
        unknown = [label for label in words if label not in known]
        if unknown:
            raise RecipeError(
                f"prompt.verbalizers names the label {unknown[0]!r}, which no row has",
                f"labels: {', '.join(sorted(known)[:20])}",
                "unknown_label",
            )
        if len(set(words.values())) != len(words):
            raise RecipeError(f"prompt.verbalizers gives one word to two labels: {words}", "give each its own")


def _check_llm(settings: Prompt, offline: bool) -> None:
    if settings.llm is None:
        return
    ChatModel(settings.llm.url, settings.llm.model)
    if offline and urlsplit(settings.llm.url).hostname not in _LOCAL:
        raise CapabilityError(
            f"--offline, and the chat model is at {settings.llm.url}",
            "take proposer: edits, or a server on this machine",
            "offline",
        )
    if settings.llm.key_env and not os.environ.get(settings.llm.key_env):
        raise CapabilityError(
            f"the environment has no {settings.llm.key_env}, which prompt.llm.key_env names",
            f"export {settings.llm.key_env}=...",
            "no_key",
        )
