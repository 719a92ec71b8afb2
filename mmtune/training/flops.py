"""Model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B): the language model's work over what a GPU can do."""

from __future__ import annotations

from typing import Any

import torch

from mmtune.models.label_tokens import parts_for_labels
from mmtune.models.towers import tower_of

# Dense bf16 FLOP/s by a part of the device's name, from the vendor's data sheets; the first that fits.
_PEAK_BF16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A10G": 70e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def flops_per_token(model: Any, label_share: float = 1.0) -> float:
    """Returns the FLOPs of one token through the language model, forward and backward.

    Two per weight in the forward pass, two for the gradient of its input, and two more for its own
    gradient where it trains. Attention's scores and the towers are left out, so the utilisation is a
    lower bound; token embeddings cost nothing, unless they are the output head too.

    Args:
        model: The model that trains.
        label_share: Share of the tokens that bear loss: only they go through the head and most of the last block.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings -= set() if head is None else {id(parameter) for parameter in head.parameters()}
    for_labels = set() if head is None else {id(parameter) for parameter in head.parameters()}
    for_labels |= {id(parameter) for part in parts_for_labels(model) for parameter in part.parameters()}
    total = 0.0
    for name, parameter in model.named_parameters():
        if tower_of(name) == "llm" and parameter.ndim >= 2 and id(parameter) not in embeddings:
            share = label_share if id(parameter) in for_labels else 1.0
            total += parameter.numel() * (6.0 if parameter.requires_grad else 4.0) * share
    return total


def peak_flops(device_name: str) -> float | None:
    """Returns the dense bf16 FLOP/s of an accelerator, or None where it is not known."""
    return next((peak for part, peak in _PEAK_BF16.items() if part in device_name), None)


def utilisation_per_token(model: Any, device: torch.device, processes: int, label_share: float = 1.0) -> float | None:
    """Returns what one token per second uses of all processes' accelerators, or None where that is not known.

    ``label_share`` is that of ``flops_per_token``.
    """
    if device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(device))
    return None if peak is None else flops_per_token(model, label_share) / (peak * processes)
