"""A tuned model to one without adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmtune.errors import IntegrityError, RecipeError
from mmtune.models.soft_prompt import BESIDE, METHODS
from mmtune.models.soft_tokens import FILE


def check_mergeable(folder: Path, method: str) -> None:
    """Refuses what no weights of a model can say: virtual tokens.

    Args:
        folder: ``adapter/``.
        method: By which it was tuned.

    Raises:
        RecipeError: It holds virtual tokens, by themselves or beside LoRA.
    """
    soft = (folder / FILE).is_file() or (folder / BESIDE).is_dir()
    if soft or method in METHODS:
        raise RecipeError(
            f"{folder} holds virtual tokens, which no weights can stand for",
            "serve the base model with adapter/ as it is, or tune with finetune.method: lora",
            "not_mergeable",
        )


def merged(model: Any) -> Any:
    """Returns a model with its adapters added to its weights, in place; one without adapters is returned as it is.

    Raises:
        IntegrityError: A merged weight is not finite.
    """
    if not hasattr(model, "merge_and_unload"):
        return model
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise IntegrityError(
            f"adapter/ cannot be merged: {str(error).splitlines()[0]}", "run: mmtune finetune --force", "not_finite"
        ) from error


def kept_in(model: Any, dtype: Any) -> Any:
    """Returns a model with its weights in a type, in place; the configs of all its parts say so too."""
    _say_dtype(model.config, dtype)
    return model.to(dtype)


def _say_dtype(config: Any, dtype: Any) -> None:
    config.dtype = dtype
    for part in (getattr(config, name, None) for name in config.sub_configs):
        # A part that a model goes without is None.
        if part is not None:
            _say_dtype(part, dtype)
