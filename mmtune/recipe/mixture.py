"""build.mixture: the section of the recipe that says how tasks are mixed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmtune.recipe.section import Section

Share = Annotated[float, Field(ge=0, le=1)]


class Mixture(Section):
    """build.mixture: how many training rows of each source, and how they are asked (FLAN, arXiv:2109.01652)."""

    clusters: dict[str, tuple[str, ...]] = {}
    """Name to the sources of one kind; a source that none names is a cluster of its own."""
    hold_out: tuple[str, ...] = ()
    """Clusters that give no training row, not even as an exemplar; their val and test rows stay."""
    rate: Literal["proportional", "square_root", "temperature"] = "proportional"
    """proportional: a source of n rows gets min(n, cap) parts; square_root and temperature: that number's root."""
    cap: Annotated[int, Field(ge=1)] | None = None
    """Most rows of a source that count for its rate."""
    temperature: Annotated[float, Field(ge=1)] = 2.0
    """T of rate temperature: min(n, cap) to the power of 1 / T."""
    rows: Annotated[int, Field(ge=1)] | None = None
    """Training rows of the whole mixture; default: as many as the capped sources have."""
    replay: dict[str, Annotated[float, Field(gt=0, lt=1)]] = {}
    """Source of an old task to its share of all training rows; the other sources share what is left."""
    shots: dict[Annotated[int, Field(ge=1, le=32)], Share] = {}
    """Number of exemplars to the share of training rows that show so many, such as {2: 0.2, 4: 0.1}; the rest none."""
    delimiters: Share = 0.0
    """Share of the rows with exemplars that show them as text of one turn, between delimiters drawn per row (blank
    lines, rules, `Q:` and `A:`, ...), in place of turns of a conversation."""
    chain_of_thought: Share = 0.0
    """Share of training rows whose rationale is taught before the answer, of those that have one."""
    options: Share | None = None
    """Share of the training rows with options whose options are listed; default: as the templates do."""
    inverted: Share = 0.0
    """Share of training rows asked the other way round, such as for the question to an answer."""

    @model_validator(mode="after")
    def _fits_together(self) -> Mixture:
        if sum(self.shots.values()) > 1 + 1e-9:
            raise ValueError("the shares of shots sum to more than 1")
        if sum(self.replay.values()) >= 1:
            raise ValueError("the shares of replay leave nothing for the other sources")
        if self.rate != "temperature" and "temperature" in self.model_fields_set:
            raise ValueError("temperature is for rate temperature: set it, or leave temperature out")
        return self
