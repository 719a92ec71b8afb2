"""AdamW over the trainable parameters, the learning rate as a function of the step, and its saved state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from mmtune.models.towers import tower_of


def learning_rate(step: int, *, peak: float, total: int, warmup: float, schedule: str) -> float:
    """Returns the rate for the 0-based step.

    Args:
        step: Steps already done.
        peak: Rate after warm-up.
        total: Steps of the run.
        warmup: Below 1 a share of the steps, else a number of steps.
        schedule: ``cosine`` (to zero), ``linear`` (to zero) or ``constant``.
    """
    warm = round(warmup * total) if warmup < 1 else int(warmup)
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    progress = (step - warm) / max(total - warm, 1)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "linear":
        return peak * (1.0 - progress)
    return peak


def make_adamw(
    model: Any,
    *,
    rate: float,
    weight_decay: float,
    beta2: float,
    tower_rates: Mapping[Any, float] | None = None,
    plus_ratio: float = 1.0,
) -> torch.optim.AdamW:
    """Returns AdamW; weight decay falls on matrices only, not on biases and norms.

    Args:
        model: Its trainable parameters are taken.
        rate: Peak learning rate.
        weight_decay: Decay of matrices.
        beta2: Decay of the second moment.
        tower_rates: Peak learning rates of single towers, in place of ``rate``.
        plus_ratio: LoRA+ (arXiv:2402.12354): rate of LoRA's B over that of its A.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = (tower_rates or {}).get(tower_of(name), rate) / rate
            scale *= plus_ratio if ".lora_B." in name or ".lora_embedding_B." in name else 1.0
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((scale, decay), []).append(parameter)
    settings = [
        {"params": parameters, "weight_decay": decay, "scale": scale, "lr": rate * scale}
        for (scale, decay), parameters in groups.items()
    ]
    return torch.optim.AdamW(settings, lr=rate, betas=(0.9, beta2))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of a step; each group takes its own multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


def optimizer_state(optimizer: torch.optim.Optimizer, model: Any) -> dict[str, torch.Tensor]:
    """Returns the optimizer's tensors by ``parameter name|slot``, on the CPU."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = {}
    for parameter, slots in optimizer.state.items():
        for slot, value in slots.items():
            tensor = value if torch.is_tensor(value) else torch.tensor(value)
            state[f"{names[id(parameter)]}|{slot}"] = tensor.detach().cpu().contiguous()
    return state


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: Any, state: dict[str, torch.Tensor]) -> None:
    """Puts saved tensors back, in place, on each parameter's device."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for key, tensor in state.items():
        name, slot = key.rsplit("|", 1)
        parameter = parameters[name]
        # Adam keeps its step counter on the CPU.
        optimizer.state[parameter][slot] = tensor.clone() if slot == "step" else tensor.clone().to(parameter.device)
