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
    """Templates that every row with options is asked in, beside its own: all that fit it, or some by name. build-data
    keeps what they say; the answer is the option of the highest mean probability over them (needs answer: rank)."""
    adapters: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Folders of further adapters of the same base, such as soft prompts of other seeds, that answer beside adapter/:
    the option of the highest mean probability with answer: rank, else the commonest answer (Lester et al. 2021)."""

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
