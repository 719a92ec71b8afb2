"""The recipe's section for export; its field docs are also the reference."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmtune.recipe.section import Section


class Export(Section):
    """export: the tuned model to exported/, one folder of weights."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What weights are kept in; auto: the base model's own. What tuning changed is small beside a weight, so fewer bits
    may lose it: the check says how much of it."""
    rows: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rows of tokens/ whose answers the exported model must lose as the tuned one does."""
