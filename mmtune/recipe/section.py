"""What every section of a recipe is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

SplitName = Literal["train", "val", "test"]
Tower = Literal["llm", "projector", "vision", "audio", "behaviour", "fusion"]
Weight = Annotated[float, Field(ge=0)]
Workers = Literal["auto"] | Annotated[int, Field(ge=1, le=256)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
