"""Which attention kernel trains packed trees: the first that proves exact on real rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mmtune.errors import CapabilityError
from mmtune.models.attention import FLEX, flex_fits, text_attention, use_text_attention
from mmtune.models.soft_prompt import virtual_tokens
from mmtune.training.tree_check import TreeCheck


@dataclass(frozen=True, slots=True)
class Proof:
    """What came of it.

    Attributes:
        exact: Trees may be trained as trees.
        kernel: The kernel that the language model is left with.
        check: Its check, or the last one that failed.
        refused: Of each kernel that was tried before that one, why it is not taken.
    """

    exact: bool
    kernel: str
    check: TreeCheck
    refused: tuple[str, ...] = ()


def kernels_to_try(model: Any, asked: str, device_type: str) -> tuple[str, ...]:
    """Returns the kernels for packed trees, the best first.

    FlexAttention skips what the mask hides, where SDPA computes and drops it; PyTorch has its
    backward pass on accelerators alone.

    Args:
        model: The model with its own kernel.
        asked: ``model.attn`` of the recipe.
        device_type: Such as ``cpu`` or ``cuda``.

    Raises:
        CapabilityError: FlexAttention is asked for on a CPU, or of a model with attention dropout.
    """
    own = text_attention(model)
    if asked == FLEX:
        if device_type == "cpu" or not flex_fits(model):
            lacks = "no backward pass on a CPU" if device_type == "cpu" else "no attention dropout, which the model has"
            raise CapabilityError(f"FlexAttention has {lacks}", "set model.attn: auto", "no_flex_attention")
        return (FLEX,)
    if asked == "auto" and device_type == "cuda" and flex_fits(model) and not virtual_tokens(model):
        return (FLEX, own)
    return (own,)


def prove(
    model: Any, kernels: Sequence[str], check: Callable[[], TreeCheck], agree: Callable[[bool], bool] = bool
) -> Proof:
    """Returns the first kernel whose packed trees equal separate rows; the model is left with it.

    Where none does, the model is left with the kernel it had.

    Args:
        model: The model to train.
        kernels: Names, the best first.
        check: Compares trees with rows under the kernel of the moment.
        agree: Whether every process found what this one did.
    """
    before = text_attention(model)
    refused: list[str] = []
    for kernel in kernels:
        use_text_attention(model, kernel)
        found = check()
        if agree(found.exact):
            return Proof(True, kernel, found, tuple(refused))
        refused.append(f"{kernel}: {found.reason or 'another process refused it'}")
    use_text_attention(model, before)
    return Proof(False, before, found, tuple(refused[:-1]))
