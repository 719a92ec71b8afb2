"""What the processes of one run do together: equal weights at the start, summed numbers and gradients.

Gradients are summed once per step, after all micro batches. So a rank whose rows hold no
picture simply adds nothing to the vision tower, and a parameter that no rank used keeps no
gradient at all, as with one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from mmtune.errors import ResourceError

_BUCKET_BYTES = 64 << 20


def world_size() -> int:
    """Returns the number of processes of this run."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextmanager
def together(what: str) -> Iterator[None]:
    """Says which common action failed when another process died or is stuck.

    Raises:
        ResourceError: The action failed or took longer than the time limit.
    """
    try:
        yield
    except RuntimeError as error:
        raise _lost_process(what, error) from error


@contextmanager
def meeting(what: str) -> Iterator[None]:
    """Says as ``together`` does which action failed, of code in which processes meet among much else.

    PyTorch gives an exchange that failed no type of its own; it is known by the library that it names. Any
    other error passes.

    Raises:
        ResourceError: An exchange failed or took longer than the time limit.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error).lower()
        if isinstance(error, distributed.DistError) or any(library in said for library in ("gloo", "nccl")):
            raise _lost_process(what, error) from error
        raise


def _lost_process(what: str, error: RuntimeError) -> ResourceError:
    return ResourceError(
        f"another process of this run died or is stuck while {what}: {str(error).splitlines()[0]}",
        "look for its error above; run the same command again to go on from the last checkpoint",
        "lost_process",
    )


def share_weights(model: torch.nn.Module) -> None:
    """Gives every process the weights and buffers of the first one, in place."""
    if world_size() > 1:
        with together("sharing the first weights"), torch.no_grad():
            for tensor in chain(model.parameters(), model.buffers()):
                distributed.broadcast(tensor.data, 0)


def sum_tensor(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """Returns the sum of a tensor over all processes."""
    if world_size() > 1:
        with together(what):
            distributed.all_reduce(tensor)
    return tensor


def sum_numbers(numbers: Mapping[str, float], what: str) -> dict[str, float]:
    """Returns the sums over all processes by name; a process need not have every name."""
    if world_size() == 1:
        return dict(numbers)
    gathered: list[Any] = [None] * world_size()
    with together(what):
        distributed.all_gather_object(gathered, dict(numbers))
    found: dict[str, float] = {}
    for own in gathered:
        for name, value in own.items():
            found[name] = found.get(name, 0.0) + value
    return found


def wait_for_all(what: str) -> None:
    """Returns when every process has come this far."""
    if world_size() > 1:
        with together(what):
            distributed.barrier()


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sums the gradients of the trainable parameters over all processes, in place.

    Those of sharded parameters are summed in the backward pass already.
    """
    if world_size() == 1:
        return
    trainable = [one for one in parameters if one.requires_grad and not isinstance(one, DTensor)]
    if not trainable:
        return
    has = torch.tensor([parameter.grad is not None for parameter in trainable], dtype=torch.int32)
    has = sum_tensor(has.to(trainable[0].device), "comparing gradients").cpu()
    used = [parameter for parameter, count in zip(trainable, has.tolist(), strict=True) if count]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in used]):
        flat = sum_tensor(torch.cat([gradient.reshape(-1) for gradient in bucket]), "summing gradients")
        for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: list[Any]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    size = 0
    for gradient in sorted(gradients, key=lambda gradient: str(gradient.dtype)):
        more = gradient.numel() * gradient.element_size()
        if bucket and (size + more > _BUCKET_BYTES or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += more
    if bucket:
        yield bucket
