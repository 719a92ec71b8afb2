"""What a run computes under beside its settings: a resumed run says where it is not as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mmtune.models.attention import text_attention
from mmtune.models.products import has_wide_products


def surroundings(model: Any, accelerator: Any, versions: Mapping[str, str], **more: Any) -> dict[str, Any]:
    """Returns what may change the last bits of a step without being a setting that a run is known by.

    Equal settings and surroundings end in the same bytes; under other ones, the same examples come in the same
    steps and their losses differ by rounding.

    Args:
        model: Ready to train.
        accelerator: For processes and device.
        versions: Library name to version.
        more: What else there is, as plain values.
    """
    device = accelerator.device
    return {
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "attention": text_attention(model),
        "products": "oneDNN" if device.type == "cpu" and has_wide_products() else "PyTorch",
        "versions": dict(versions),
        **more,
    }
