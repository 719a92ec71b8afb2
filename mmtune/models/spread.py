"""Tensors of which every process holds a part (PyTorch's DTensor, DeepSpeed's ZeRO), and their whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Says whether the processes each hold a part of some weight or of its optimizer state."""
    return any(
        isinstance(parameter, DTensor) or _by_zero(parameter) or hasattr(parameter, "_hp_mapping")
        for parameter in model.parameters()
    )


def _by_zero(tensor: torch.Tensor) -> bool:
    """Says whether DeepSpeed's ZeRO-3 keeps a part of it, flat and padded, in ``ds_tensor``."""
    return hasattr(tensor, "ds_tensor")


def numel(parameter: Any) -> int:
    """Returns the numbers in the whole of a parameter."""
    return int(parameter.ds_numel if _by_zero(parameter) else parameter.numel())


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Runs the model without gradients; every process then holds its part of the weights again.

    FSDP2 itself gives gathered weights up in the backward pass, and until then an optimizer or a
    checkpoint would find them in the place of the parts.
    """
    try:
        with torch.no_grad():
            yield
    finally:
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the whole of a tensor that is spread over the processes, all of which must ask; others as they are."""
    if _by_zero(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Returns what this process holds of a tensor."""
    if _by_zero(tensor):
        part: torch.Tensor = tensor.ds_tensor  # type: ignore[attr-defined]
        return part
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Returns a whole tensor in the form of another: spread over the same processes, or whole on its device."""
    if _by_zero(model):
        part = own_part(model)
        flat = tensor.new_zeros(part.numel() * distributed.get_world_size())
        flat[: tensor.numel()] = tensor.reshape(-1)
        return flat.narrow(0, part.numel() * distributed.get_rank(), part.numel()).to(part.device)
    if not isinstance(model, DTensor):
        return tensor.to(model.device)
    mesh = model.device_mesh
    parts = tensor.chunk(mesh.size())
    # FSDP2 cuts along the first dimension as chunk does; the last processes may hold nothing.
    own = parts[mesh.get_local_rank()] if mesh.get_local_rank() < len(parts) else tensor[:0]
    local = own.to(model.to_local().device)
    return DTensor.from_local(local, mesh, model.placements, shape=tensor.shape, stride=tensor.stride())
