"""A base in 4 bits for QLoRA (arXiv:2305.14314): nf4 with double quantization, by bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mmtune.errors import CapabilityError
from mmtune.models.towers import tower_of

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


def nf4_config(cls: Any, config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """Returns the quantization config for the language model's linear layers alone.

    Towers, projector and output head keep their weights: they are small, and their inputs have
    the outliers that 4 bits lose.

    Args:
        cls: The transformers class of the model.
        config: Its config.
        dtype: Type that the layers compute in.

    Raises:
        CapabilityError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise CapabilityError(
            "finetune.quantize: nf4 needs bitsandbytes", "pip install 'mmtune[qlora]'", "bitsandbytes_missing"
        )
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig

    with torch.device("meta"):
        shape = cls(config)
    head = shape.get_output_embeddings()
    left_out = [
        name
        for name, module in shape.named_modules()
        if isinstance(module, nn.Linear) and (module is head or tower_of(name) != "llm")
    ]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=left_out,
    )


def keep_layout(model: Any) -> None:
    """Keeps the 4-bit weights as they are in a pass without gradients, in place.

    bitsandbytes packs them anew for such a pass on a CPU with AVX-512 BF16, and computes later training steps,
    after a validation loss say, through a kernel that has no backward pass.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
