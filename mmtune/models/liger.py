"""Liger's Triton kernels for norms, rotary positions and gated MLPs, on a GPU where they are installed."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from mmtune.errors import CapabilityError

# The head sees label tokens alone and their cross-entropy is chunked, which Liger's own loss would undo.
_KERNELS = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def use_liger(model: Any) -> bool:
    """Puts Liger's kernels into the model, in place; says whether it did.

    It does where there is a GPU, liger-kernel is installed (``mmtune[fast]``) and knows the family.

    Raises:
        CapabilityError: This liger-kernel expects another transformers; the model is as it was.
    """
    import torch
    from transformers.integrations.liger import apply_liger_kernel
    from transformers.utils import is_liger_kernel_available

    if not torch.cuda.is_available() or not is_liger_kernel_available():
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return False
    try:
        apply_liger_kernel(model, _KERNELS)
    except (ImportError, AttributeError) as error:
        ours, theirs = version("liger-kernel"), version("transformers")
        raise CapabilityError(
            f"liger-kernel {ours} does not go with {model.config.model_type} of transformers {theirs}"
            f" ({type(error).__name__}: {error.args[0]})",
            "set finetune.liger: off, or install another liger-kernel",
            "liger_does_not_fit",
        ) from error
    return True
