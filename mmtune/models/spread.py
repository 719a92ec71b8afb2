"""Tensors of which every process holds a part (PyTorch's DTensor), and their whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Says whether the processes each hold a part of some weight."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


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
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Returns what this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Returns a whole tensor in the form of another: spread over the same processes, or whole on its device."""
    if not isinstance(model, DTensor):
        return tensor.to(model.device)
    mesh = model.device_mesh
    parts = tensor.chunk(mesh.size())
    # FSDP2 cuts along the first dimension as chunk does; the last processes may hold nothing.
    own = parts[mesh.get_local_rank()] if mesh.get_local_rank() < len(parts) else tensor[:0]
    local = own.to(model.to_local().device)
    return DTensor.from_local(local, mesh, model.placements, shape=tensor.shape, stride=tensor.stride())
