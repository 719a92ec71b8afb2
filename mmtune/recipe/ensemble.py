"""eval.ensemble: several prompts that answer together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, field_validator, model_validator

from mmtune.recipe.section import Section


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _names(value: Any) -> Any:
    return value if value == "all" else _listed(value)


class Ensemble(Section):
    """Several prompts, one model: each is scored alone, and all together."""

    wordings: Annotated[Literal["all"] | tuple[str, ...], BeforeValidator(_names)] = ()
    """Templates that every row with options is asked in: all that fit it, or two or more by name. The answer is the
    option of the highest mean probability over them (needs answer: rank). A row's own wording is asked and scored too,
    but counts only where it is one of them. build-data keeps what they say; nothing that was trained is made again."""
    adapters: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Folders of further adapters of the same base, such as soft prompts of other seeds, that answer beside adapter/:
    the option of the highest mean probability with answer: rank, else the commonest answer, of equally common ones
    that of adapter/ first (Lester et al. 2021); so without rank name two or more, which makes three that vote."""

    @field_validator("wordings", "adapters")
    @classmethod
    def _each_once(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not isinstance(value, str) and len(set(value)) != len(value):
            raise ValueError("one is named twice")
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> Ensemble:
        if bool(self.wordings) == bool(self.adapters):
            raise ValueError("name either wordings or adapters")
        return self
