"""A language model spread over the processes of a run, by PyTorch's FSDP2.

Each process holds its part of every weight of the language model, of its gradient and of its
optimizer state; a layer's weights are gathered when it runs. Towers and projector, a small part of
the weights, stay whole on every process: their gradients are summed as without sharding, so a
process whose rows hold no picture keeps none waiting.

Outside, everything is whole: checkpoints and adapters do not know how many processes wrote them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mmtune.models.spread import own_part, whole
from mmtune.models.towers import tower_of
from mmtune.training.ranks import together, world_size


def meet_for_offload(timeout: timedelta, *, alone: bool = False) -> None:
    """Lets the processes exchange tensors of either memory; called before Accelerate, which takes NCCL alone.

    Args:
        timeout: Longest wait for the others.
        alone: There is one process; FSDP2 wants a group of it.
    """
    if distributed.is_initialized():
        return
    place: dict[str, Any] = {"store": distributed.HashStore(), "rank": 0, "world_size": 1} if alone else {}
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, **place)
    elif alone:
        distributed.init_process_group("gloo", timeout=timeout, **place)


def shard_language_model(model: Any, device: torch.device, *, keep_gathered: bool, offload: bool = False) -> None:
    """Spreads the language model over all processes and moves the model to the device, in place.

    Args:
        model: On the CPU; not quantized.
        device: Of this process.
        keep_gathered: Weights stay whole between forward and backward pass: ZeRO-2's split of gradients
            and optimizer state (arXiv:1910.02054). Otherwise they are gathered twice: ZeRO-3.
        offload: Parts of the weights, their gradients and the optimizer state rest in the CPU's memory.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    _share_what_trains(model, device)
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    whole = {parameter for name, parameter in model.named_parameters() if tower_of(name) != "llm"}
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (world_size(),)),
        "offload_policy": policy,
        "ignored_params": whole,
    }
    for layer in inner.get_decoder().layers:
        fully_shard(layer, reshard_after_forward=not keep_gathered, **options)
    fully_shard(model, **options)
    for part in model.modules():
        if hasattr(part, "set_gradient_divide_factor"):
            # The loss is divided by all label tokens already: gradients are summed, not averaged.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    for tensor in [*model.parameters(), *model.buffers()]:
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)


def _share_what_trains(model: Any, device: torch.device) -> None:
    """Gives every process the first one's trainable weights; frozen ones come from the same files."""
    with together("sharing the first weights"), torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                moved = parameter.data.to(device)
                distributed.broadcast(moved, 0)
                parameter.data.copy_(moved)


def gradient_norm(parameters: Iterable[torch.Tensor], clip: float | None) -> float:
    """Clips the gradients, whole or spread, to one norm, in place; returns the norm before."""
    found = [parameter for parameter in parameters if parameter.grad is not None]
    spread = [parameter for parameter in found if isinstance(parameter, DTensor)]
    rest = [parameter for parameter in found if not isinstance(parameter, DTensor)]
    kinds = [kind for kind in (spread, rest) if kind]
    if not kinds:
        return 0.0
    norms = [whole(nn.utils.get_total_norm([one.grad for one in kind if one.grad is not None])) for kind in kinds]
    total = torch.stack([norm.float().to(norms[0].device) for norm in norms]).norm() if spread else norms[0]
    norm = float(total)
    # Of a norm within the limit PyTorch would multiply every gradient by 1.
    if clip is not None and not norm + 1e-6 <= clip:
        for kind in kinds:
            nn.utils.clip_grads_with_norm_(kind, clip, total.to(own_part(kind[0]).device))
    return norm
