"""The optimizer over the trainable parameters, the learning rate as a function of the step, and its saved state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from mmtune.errors import CapabilityError
from mmtune.models.spread import own_part, spread_like, whole
from mmtune.models.towers import tower_of
from mmtune.training.zero import Zero


def learning_rate(step: int, *, peak: float, total: int, warmup: float, schedule: str) -> float:
    """Returns the rate for the 0-based step.

    Args:
        step: Steps already done.
        peak: Rate after warm-up.
        total: Steps of the run.
        warmup: Below 1 a share of the steps, else a number of steps.
        schedule: ``cosine`` (to zero), ``linear`` (to zero) or ``constant``.
    """
    warm = warm_steps(warmup, total)
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    progress = (step - warm) / max(total - warm, 1)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "linear":
        return peak * (1.0 - progress)
    return peak


def warm_steps(warmup: float, total: int) -> int:
    """Returns the steps of warm-up: a share of all of them below 1, else their number."""
    return round(warmup * total) if warmup < 1 else int(warmup)


@dataclass(frozen=True)
class Pace:
    """How a parameter steps.

    Attributes:
        scale: Its learning rate over that of the others.
        beta1: AdamW's decay of the first moment.
        steady: Its rate stays at the peak, whatever the schedule.
    """

    scale: float = 1.0
    beta1: float = 0.9
    steady: bool = False


USUAL = Pace()


class Joined:
    """Several optimizers, each over its own parameters, that step as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        """Takes optimizers that share no parameter."""
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts, live."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Any, dict[str, Any]]:
        """Each parameter's slots, live."""
        return {
            parameter: part.state[parameter]
            for part in self.parts
            for group in part.param_groups
            for parameter in group["params"]
        }

    def step(self) -> None:
        """Steps every part."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)


Optimizer = torch.optim.Optimizer | Joined


def make_optimizer(
    model: Any,
    *,
    rate: float,
    weight_decay: float,
    beta2: float,
    name: str = "adamw",
    tower_rates: Mapping[Any, float] | None = None,
    plus_ratio: float = 1.0,
    prompt_rate: float | None = None,
    tower: Callable[[str], str] = tower_of,
    pace: Callable[[str], Pace] = lambda name: USUAL,
) -> Optimizer:
    """Returns AdamW, AdamW with its moments in 8 bits, or Muon with AdamW for what Muon is not made for.

    Weight decay falls on matrices only, not on biases and norms. Muon (Jordan 2024; torch.optim.Muon) takes the
    weight matrices of hidden layers, its update scaled to AdamW's size (arXiv:2502.16982) so that one learning rate
    fits both; embeddings, heads, convolutions, biases and norms stay with AdamW. 8-bit moments (arXiv:2110.02861) are
    bitsandbytes'; parameters under 4,096 numbers keep full ones.

    Args:
        model: Its trainable parameters are taken.
        rate: Peak learning rate.
        weight_decay: Decay of matrices.
        beta2: AdamW's decay of the second moment.
        name: ``adamw``, ``adamw_8bit`` or ``muon``.
        tower_rates: Peak learning rates of single towers, in place of ``rate``.
        plus_ratio: LoRA+ (arXiv:2402.12354): rate of LoRA's B over that of its A.
        prompt_rate: Peak learning rate of virtual tokens, in place of ``rate``.
        tower: Parameter name to its tower.
        pace: Parameter name to how it steps; one of a pace of its own stays with AdamW.

    Raises:
        CapabilityError: ``adamw_8bit`` without bitsandbytes.
    """
    kinds: dict[torch.nn.Parameter, _Kind] = {}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = (tower_rates or {}).get(tower(parameter_name), rate)
            if prompt_rate is not None and ("prompt_encoder." in parameter_name or "soft_tokens." in parameter_name):
                own = prompt_rate
            is_b = ".lora_B." in parameter_name or ".lora_embedding_B." in parameter_name
            steps = pace(parameter_name)
            scale = own / rate * steps.scale * (plus_ratio if is_b else 1.0)
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            kinds[parameter] = _Kind(scale, decay, steps, isinstance(parameter, DTensor))
    large = _hidden_matrices(model) if name == "muon" else set()
    hidden = {parameter: kind for parameter, kind in kinds.items() if parameter in large and kind.pace == USUAL}
    rest = {parameter: kind for parameter, kind in kinds.items() if parameter not in hidden}
    parts: list[torch.optim.Optimizer] = []
    if hidden:
        parts.append(torch.optim.Muon(_groups(hidden, rate, beta2), lr=rate, adjust_lr_fn="match_rms_adamw"))
    if rest:
        betas = (0.9, beta2)
        if name == "adamw_8bit":
            parts.append(_adamw_8bit()(_groups(rest, rate, beta2), lr=rate, betas=betas))
        else:
            # One kernel for all of a parameter's arithmetic: a fifth of the time on a CPU.
            parts.append(torch.optim.AdamW(_groups(rest, rate, beta2), lr=rate, betas=betas, fused=True))
    return parts[0] if len(parts) == 1 else Joined(*parts)


class _Kind(NamedTuple):
    """What the parameters of a group have in common.

    Attributes:
        scale: Of the learning rate.
        decay: Weight decay.
        pace: How they step.
        sharded: One kernel does not take sharded parameters together with whole ones.
    """

    scale: float
    decay: float
    pace: Pace
    sharded: bool


def _groups(kinds: Mapping[torch.nn.Parameter, _Kind], rate: float, beta2: float) -> list[dict[str, Any]]:
    """Returns an optimizer's groups, one for each kind, in the order of their first parameters."""
    found: dict[_Kind, list[torch.nn.Parameter]] = {}
    for parameter, kind in kinds.items():
        found.setdefault(kind, []).append(parameter)
    return [
        {
            "params": members,
            "weight_decay": kind.decay,
            "scale": kind.scale,
            "lr": rate * kind.scale,
            "steady": kind.pace.steady,
        }
        | ({} if kind.pace == USUAL else {"betas": (kind.pace.beta1, beta2)})
        for kind, members in found.items()
    ]


def _adamw_8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise CapabilityError(
            "finetune.optimizer adamw_8bit needs bitsandbytes, which is not installed",
            "install it: pip install 'mmtune[qlora]', or take optimizer: adamw",
            "no_bitsandbytes",
        ) from error
    return AdamW8bit


def _hidden_matrices(model: Any) -> set[torch.Tensor]:
    """Returns the trainable matrices of linear layers, the output head apart."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    apart = set() if head is None else set(head.parameters())
    linear = {module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)}
    return {weight for weight in linear - apart if weight.requires_grad and weight.ndim == 2}


def set_rate(optimizer: Optimizer | Zero, rate: float) -> None:
    """Sets the learning rate of a step; each group takes its own multiple of it, and a steady one stays."""
    for group in optimizer.param_groups:
        if not group.get("steady", False):
            group["lr"] = rate * group.get("scale", 1.0)


def optimizer_state(optimizer: Optimizer | Zero, model: Any) -> dict[str, torch.Tensor]:
    """Returns the optimizer's tensors by ``parameter name|slot``, whole, on the CPU; all processes must ask."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = {}
    for parameter, slots in optimizer.state.items():
        for slot, value in slots.items():
            tensor = value if torch.is_tensor(value) else torch.tensor(value)
            # A copy: bitsandbytes shares a table among parameters, which safetensors refuses.
            state[f"{names[id(parameter)]}|{slot}"] = whole(tensor.detach()).cpu().contiguous().clone()
    return state


def load_optimizer_state(optimizer: Optimizer | Zero, model: Any, state: dict[str, torch.Tensor]) -> None:
    """Puts saved tensors back, in place, on each parameter's device and in its part."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if isinstance(optimizer, Zero):
        found: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}
        for key, tensor in state.items():
            name, slot = key.rsplit("|", 1)
            found.setdefault(parameters[name], {})[slot] = tensor
        optimizer.put_back(found)
        return
    slots = optimizer.state
    for key, tensor in state.items():
        name, slot = key.rsplit("|", 1)
        parameter = parameters[name]
        if tensor.ndim == 0 and not tensor.is_floating_point():
            slots[parameter][slot] = int(tensor)
        elif tensor.ndim == 0:
            slots[parameter][slot] = tensor.clone().to(own_part(parameter).device)
        else:
            slots[parameter][slot] = spread_like(tensor.clone(), parameter)
