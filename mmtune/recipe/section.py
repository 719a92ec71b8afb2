"""What every section of a recipe is."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

SplitName = Literal["train", "val", "test"]
Tower = Literal["llm", "projector", "vision", "audio", "behaviour", "fusion"]
Weight = Annotated[float, Field(ge=0)]
Workers = Literal["auto"] | Annotated[int, Field(ge=1, le=256)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, numbers are finite, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic takes true for 1.
        if isinstance(value, bool) and not _takes_truth(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("input should not be true or false")
        return value


def _takes_truth(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(map(_takes_truth, get_args(annotation)))
