"""eval: the settings of eval."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from mmtune.recipe.section import Section, SplitName


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
    """At most this many rows."""
    answer: Literal["generate", "rank"] = "generate"
    """rank: a row with options is answered by the option that the model finds likeliest, not in its own words."""
    loss: bool = True
    """Also report the perplexity of the reference answers."""
    fail_under: dict[str, float] = {}
    """Metric name to the least score of the tuned model; below it the command exits with 9."""

    @field_validator("compare", "metrics")
    @classmethod
    def _some_of_each(cls, value: tuple[str, ...] | str) -> tuple[str, ...] | str:
        if not value:
            raise ValueError("name at least one")
        if not isinstance(value, str) and len(set(value)) != len(value):
            raise ValueError("one is named twice")
        return value
