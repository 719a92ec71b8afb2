"""eval: the settings of eval."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from mmtune.recipe.ensemble import Ensemble
from mmtune.recipe.exemplars import Exemplars
from mmtune.recipe.section import Section, SplitName


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


Shots = Annotated[int, Field(ge=0, le=32)]
BY_STATES = ("prototype", "soft")
"""Values of ``answer`` that need solved rows."""


class Eval(Section):
    """eval: model(s) and instructions/ to report/."""

    split: SplitName = "val"
    """The split that is scored."""
    compare: tuple[Literal["base", "best_prompt", "tuned", "tuned_best_prompt"], ...] = ("base", "tuned")
    """Models that answer the same rows; best_prompt and tuned_best_prompt are asked with the prompt in prompt/."""
    metrics: Literal["auto"] | tuple[str, ...] = "auto"
    """auto takes each task's own metric; or names of metrics."""
    bootstrap: Annotated[int, Field(ge=100, le=100_000)] = 1000
    """Resamples for the intervals."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    """Longest answer."""
    batch_rows: Annotated[int, Field(ge=1)] = 16
    """Rows generated at once."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """At most this many rows, a sample of all sources; the report names it."""
    answer: Literal["generate", "rank", "prototype", "soft"] = "generate"
    """rank: a row with options is answered by the option that the model finds likeliest, not in its own words;
    prototype: by the one whose training rows leave the model in the nearest state before the answer, in the mean
    (a verbalizer without label words); soft: by the one whose vector fits that state best, which starts as the output
    embedding of the option's words and learns from its training rows, the model frozen (a soft verbalizer). How far it
    may leave the words, its strength, is judged on training rows held out of labels with two or more. Both not with
    shots, ablate, a searched prompt or a model of several passes."""
    per_label: Annotated[int, Field(ge=1)] = 16
    """Training rows of every label that answer prototype and soft look at."""
    shots: Annotated[tuple[Shots, ...], BeforeValidator(_listed, json_schema_input_type=Shots | tuple[Shots, ...])] = (
        0,
    )
    """Solved training rows shown before each question: a number, or several such as [0, 4], all asked of the same
    rows and models."""
    exemplars: Annotated[
        tuple[Exemplars, ...],
        BeforeValidator(_listed, json_schema_input_type=Exemplars | tuple[Exemplars, ...]),
    ] = (Exemplars(),)
    """How shots are chosen out of instructions/train; several ways are compared on the same rows. Beside retrieval
    stands what its exemplars alone would answer by majority."""
    ensemble: Ensemble | None = None
    """Several templates or adapters that answer together; absent: none."""
    loss: bool = True
    """Also report the perplexity of the reference answers."""
    ablate: tuple[Literal["modality", "fusion", "shots", "instructions"], ...] = ()
    """Ask the last model again without: modality (each medium in turn), fusion (each pass of a late or hybrid model
    alone), shots (no exemplars), instructions (questions change places); intervals and tests on the same rows. With
    modality, a base that was pretrained with the adversarial objective also says how well its generators fill in the
    code of what is missing."""
    fail_under: dict[str, float] = {}
    """Metric name to the least score of the last model, such as {vqa_accuracy: 60}; below it the command exits with 9.
    Scores are of 100, as the report has them (cider: 100 is the official 1.0, and more is possible); of wer and cer,
    in percent of the reference's length, the bar is the most."""

    @field_validator("ablate")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("one is named twice")
        return value

    @field_validator("compare", "metrics", "shots", "exemplars")
    @classmethod
    def _some_of_each(cls, value: Any) -> Any:
        if not value:
            raise ValueError("name at least one")
        if not isinstance(value, str) and any(one in value[:at] for at, one in enumerate(value)):
            raise ValueError("one is named twice")
        return value

    @model_validator(mode="after")
    def _states_of_rows_as_they_stand(self) -> Eval:
        if self.answer not in BY_STATES:
            if "per_label" in self.model_fields_set:
                raise ValueError("per_label is for answer prototype and soft: set one, or leave per_label out")
            return self
        idle = [name for name in ("shots", "ablate") if any(getattr(self, name))]
        idle += [f"compare {name}" for name in self.compare if name.endswith("best_prompt")]
        if idle:
            raise ValueError(f"answer {self.answer} compares rows as they stand: leave out {idle[0]}")
        return self

    @model_validator(mode="after")
    def _members_that_can_answer(self) -> Eval:
        if self.ensemble is None:
            return self
        if any(self.shots):
            raise ValueError("ensemble asks rows without exemplars: leave shots out, or ensemble")
        if self.ensemble.wordings and self.answer != "rank":
            raise ValueError("ensemble.wordings joins the probabilities of options: set answer: rank")
        if self.ensemble.adapters and "tuned" not in self.compare:
            raise ValueError("ensemble.adapters answer beside adapter/: add tuned to compare")
        if len(self.ensemble.adapters) == 1 and self.answer != "rank":
            raise ValueError(
                "ensemble.adapters vote where nothing is ranked, and of two votes the first always wins: name two or"
                " more adapters beside adapter/, or set answer: rank"
            )
        return self

    @model_validator(mode="after")
    def _exemplars_are_shown(self) -> Eval:
        if "exemplars" in self.model_fields_set and not any(self.shots):
            raise ValueError("exemplars needs shots above 0: set shots, or leave exemplars out")
        return self
