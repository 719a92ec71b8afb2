"""The tuning methods by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmtune.errors import RecipeError
from mmtune.models.adapter import add_ia3, add_lora, train_fully
from mmtune.models.lora_linear import fuse_lora
from mmtune.models.soft_prompt import METHODS, add_beside, add_soft_prompt
from mmtune.models.soft_tokens import add_soft_tokens, first_vectors


def with_method(
    model: Any,
    method: str,
    *,
    towers: Sequence[str],
    lora: Mapping[str, Any],
    virtual_tokens: int,
    base_path: str,
    soft_prompt: Mapping[str, Any] | None = None,
    soft_tokens: int = 0,
) -> Any:
    """Returns the model with exactly that trainable which the method trains.

    Args:
        model: The base model.
        method: ``lora``, ``full``, ``ia3``, ``prompt``, ``p_tuning`` or ``prefix``.
        towers: Towers that train.
        lora: Arguments of ``add_lora``.
        virtual_tokens: Length of a soft prompt.
        base_path: Recorded in the adapter.
        soft_prompt: What ``add_soft_prompt`` starts from; with ``lora`` a soft prompt trains beside it.
        soft_tokens: How many learned vectors the templates have in their text; they take the place of virtual tokens.

    Raises:
        RecipeError: A tower or target does not exist, or the method trains no soft tokens.
        CapabilityError: The method does not fit the family.
    """
    if soft_tokens:
        named = {"towers": towers, "base_path": base_path, **lora}
        return _with_soft_tokens(model, method, soft_tokens, soft_prompt or {}, named)
    if method == "full":
        return train_fully(model, towers)
    if method == "ia3":
        return add_ia3(model, base_path)
    prompt = {"virtual_tokens": virtual_tokens, "base_path": base_path, **(soft_prompt or {})}
    if method in METHODS:
        return add_soft_prompt(model, method, **prompt)
    adapted = add_lora(model, towers=towers, base_path=base_path, **lora)
    fuse_lora(adapted)
    return adapted if soft_prompt is None else add_beside(adapted, **prompt)


def _with_soft_tokens(model: Any, method: str, count: int, start: Mapping[str, Any], lora: Mapping[str, Any]) -> Any:
    if method not in ("prompt", "lora"):
        raise RecipeError(
            f"the templates have soft tokens, which method {method} does not train",
            "set finetune.method to prompt or lora, or take templates without {soft: n}",
            "soft_tokens_untrained",
        )
    known = ("init", "text_ids", "label_ids")
    vectors = first_vectors(model, count, **{name: start[name] for name in known if name in start})
    if method == "lora":
        adapted = add_lora(model, **lora)
        fuse_lora(adapted)
        return add_soft_tokens(adapted, vectors)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return add_soft_tokens(model, vectors)
