"""build.exemplars and eval.exemplars: how the solved rows that stand before a question are chosen."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmtune.recipe.extract import FeatureKind
from mmtune.recipe.section import Section


class Exemplars(Section):
    """How exemplars are chosen: training rows with their answers, never the row itself or a copy of its media."""

    method: Literal["random", "retrieval"] = "random"
    """random draws by seed and id; retrieval takes the rows whose features are nearest (of features/, by extract)."""
    by: tuple[FeatureKind, ...] = ()
    """What retrieval compares: image, audio, video, text, behaviour, or several of equal weight; left out: all that
    features/ hold."""
    order: Literal["nearest_last", "nearest_first", "random"] = "nearest_last"
    """How they stand; where they do not all fit in tokenize.max_length, the farthest are left out first."""
    diversity: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Above 0: maximal marginal relevance, 1 - lambda of Carbonell and Goldstein (1998), among the 32 nearest."""
    balance: bool = False
    """The answers take turns: none stands a second time while another one has not stood yet."""
    pool: Literal["own", "all"] | tuple[str, ...] = "own"
    """Where they come from: training rows of the row's own source, of all sources, or of the named ones; a held-out
    cluster gives none. Left out in eval: that of build.exemplars."""

    @model_validator(mode="after")
    def _fits_together(self) -> Exemplars:
        idle = [name for name in ("by", "order", "diversity") if name in self.model_fields_set]
        if self.method == "random" and idle:
            raise ValueError(f"{idle[0]} is for method retrieval: set it, or leave {idle[0]} out")
        if len(set(self.by)) != len(self.by):
            raise ValueError("by names one kind twice")
        if not self.pool:
            raise ValueError("pool names no source: own, all, or a list of training sources")
        return self

    @property
    def shown(self) -> Literal["nearest_last", "nearest_first", "random"]:
        """How they stand; random ones as they were drawn."""
        return self.order if self.method == "retrieval" else "nearest_first"


class BuildExemplars(Exemplars):
    """build.exemplars: the exemplars of training rows."""

    k: Annotated[int, Field(ge=1, le=32)] = 4
    """How many each training row shows; mixture.shots says it instead where it is given."""
