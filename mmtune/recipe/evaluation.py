"""eval: the settings of eval."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from mmtune.recipe.section import Section, SplitName


class Eval(Section):
    """eval: model(s) and instructions/ to report/."""

    split: SplitName = "val"
    """The split that is scored."""
    compare: tuple[Literal["base", "tuned"], ...] = ("base", "tuned")
    """Models that answer the same rows."""
    metrics: Literal["auto"] | tuple[str, ...] = "auto"
    """auto takes each task's own metric; or names of metrics."""
    bootstrap: Annotated[int, Field(ge=100, le=100_000)] = 1000
    """Resamples for the intervals."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    """Longest answer."""
    batch_rows: Annotated[int, Field(ge=1)] = 16
    """Rows generated at once."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """At most this many rows."""
    answer: Literal["generate", "rank"] = "generate"
    """rank: a row with options is answered by the option that the model finds likeliest, not in its own words."""
    loss: bool = True
    """Also report the perplexity of the reference answers."""
    ablate: tuple[Literal["modality", "fusion", "shots", "instructions"], ...] = ()
    """Ask the last model again without: modality (each medium in turn), fusion (each pass of a late or hybrid model
    alone), shots (no exemplars), instructions (questions change places); intervals and tests on the same rows."""
    fail_under: dict[str, float] = {}
    """Metric name to the least score of the tuned model; below it the command exits with 9."""

    @field_validator("ablate")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("one is named twice")
        return value

    @field_validator("compare", "metrics")
    @classmethod
    def _some_of_each(cls, value: tuple[str, ...] | str) -> tuple[str, ...] | str:
        if not value:
            raise ValueError("name at least one")
        if not isinstance(value, str) and len(set(value)) != len(value):
            raise ValueError("one is named twice")
        return value
