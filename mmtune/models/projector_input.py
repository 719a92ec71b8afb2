"""What enters a projector that trains over a frozen tower, kept so that the projector alone runs at every step.

What a family does behind its projector is its own: LLaVA-NeXT packs tiles and puts a learned row at
the end of each line, Qwen2.5-VL puts windows back in order. All of it chooses rows of what the
projector made. So the choice is read off once, by finding the rows again, and what is kept stands
in the order of the media tokens already.

A projector is run on units. Where it makes each row of its own (an MLP) or of a few neighbours (a
merger), a unit is what one token is made of; where it needs a whole image (pooling over a square),
a unit is a whole image or tile.

Shapes: U units of K rows, C tower width, N media tokens, H model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmtune.models.towers import tower_of

# A kept tensor's name says through which module it goes, or at whose rows a mask points.
_THROUGH, _OWN = "|", "@"
# Relative difference of a projector's rows when its units are put together in another way.
_TOLERANCE = {torch.float32: 1e-4}
_COARSE = 2e-2


@dataclass(frozen=True)
class Call:
    """One run of a projector.

    Attributes:
        name: Its name in the base model.
        module: Itself.
        entered: What it was given, ``(..., C)``.
        made: What it made, ``(..., H)``.
    """

    name: str
    module: nn.Module
    entered: torch.Tensor
    made: torch.Tensor


@contextmanager
def watched(base: nn.Module) -> Iterator[list[Call]]:
    """Gives the list to which every run of a projector inside is added."""
    calls: list[Call] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], made: Any) -> None:
            entered = [value for value in (*given, *named.values()) if value is not None]
            if len(entered) != 1 or not torch.is_tensor(made):
                raise ValueError(f"the projector {name} takes more than one tensor")
            calls.append(Call(name, module, entered[0], made))

        return hook

    hooks = [module.register_forward_hook(note(name), with_kwargs=True) for name, module in _projectors(base)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _projectors(base: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns the outermost modules of the projector, which run as a whole."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in base.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if not inside and tower_of(name) == "projector" and not isinstance(module, nn.ModuleList):
            found.append((name, module))
    return found


def enters(base: nn.Module, rows: Mapping[str, torch.Tensor], calls: Sequence[Call]) -> dict[str, torch.Tensor]:
    """Returns what to keep: units ``(U, K, C)`` by name, and ``(N,)`` masks of rows that the family adds itself.

    Args:
        base: The transformers model.
        rows: What the family made of the media in the end, ``(N, H)`` each.
        calls: The projector's runs on the way.

    Raises:
        ValueError: Some row is neither one of the projector's nor a learned one, or the projector mixes media.
    """
    kept: dict[str, torch.Tensor] = {}
    for name, final_NH in rows.items():
        call, index_N = _origin(name, final_NH, calls)
        own_N = index_N < 0
        units = _units(name, call, final_NH, index_N)
        kept[f"{name}{_THROUGH}{call.name}"] = units.contiguous()
        if own_N.any():
            kept[f"{name}{_OWN}{_learned_row(base, name, final_NH[own_N])}"] = own_N
    return kept


def behind(
    base: nn.Module, inputs: Mapping[str, Any], families: tuple[str, ...]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns the rows ``(N, H)`` of kept tensors by name, the projector run where it is due, and the other inputs.

    Args:
        base: The transformers model.
        inputs: Of a training step.
        families: How the names of kept tensors begin.
    """
    rows: dict[str, torch.Tensor] = {}
    kept = {name: value for name, value in inputs.items() if name.startswith(families)}
    for name, value in kept.items():
        final, _, module = name.partition(_THROUGH)
        if module:
            rows[final] = base.get_submodule(module)(value).flatten(0, -2)
        elif _OWN not in name:
            rows[final] = value
    for name, own_N in kept.items():
        final, _, parameter = name.partition(_OWN)
        if parameter:
            learned_H = base.get_parameter(parameter).to(rows[final].dtype)
            rows[final] = torch.where(own_N[:, None], learned_H, rows[final])
    return rows, {name: value for name, value in inputs.items() if name not in kept}


def _origin(name: str, final_NH: torch.Tensor, calls: Sequence[Call]) -> tuple[Call, torch.Tensor]:
    """Returns the run that some rows come from, and ``(N,)`` the row of it that each is; -1 where it is none."""
    for call in calls:
        made = call.made.reshape(-1, call.made.shape[-1]).to(final_NH.dtype)
        if made.shape == final_NH.shape and torch.equal(made, final_NH):
            return call, torch.arange(len(made))
    for call in calls:
        made = call.made.reshape(-1, call.made.shape[-1]).to(final_NH.dtype)
        places = {row: index for index, row in enumerate(_bytes_of(made))}
        index_N = torch.tensor([places.get(row, -1) for row in _bytes_of(final_NH)])
        if (index_N >= 0).any():
            return call, index_N
    raise ValueError(f"{name} are no rows of the projector")


def _bytes_of(rows: torch.Tensor) -> list[bytes]:
    flat = rows.detach().cpu().contiguous().view(torch.uint8).numpy()
    return [row.tobytes() for row in flat]


def _learned_row(base: nn.Module, name: str, rows: torch.Tensor) -> str:
    """Returns the name of the parameter that all these rows are."""
    for own, parameter in base.named_parameters():
        fits = parameter.shape == rows.shape[1:] and tower_of(own) == "projector"
        if fits and torch.equal(parameter.detach().to(rows.dtype).expand_as(rows), rows):
            return own
    raise ValueError(f"some of {name} are neither rows of the projector nor a learned one")


def _units(name: str, call: Call, final_NH: torch.Tensor, index_N: torch.Tensor) -> torch.Tensor:
    """Returns the smallest units that the projector makes the rows of, ``(U, K, C)``, in the order of the rows."""
    entered, made = call.entered, call.made.reshape(-1, call.made.shape[-1])
    count, rest = divmod(entered.numel() // entered.shape[-1], len(made))
    ours = index_N >= 0
    if not rest:
        picked = entered.reshape(len(made), count, -1)[index_N.clamp(min=0).to(entered.device)]
        picked = picked * ours.to(picked)[:, None, None]
        if _makes(call.module, picked, final_NH, ours):
            return picked
    in_order = torch.equal(index_N, torch.arange(len(made)))
    if in_order and entered.ndim == 3 and _makes(call.module, entered, final_NH, ours):
        return entered
    raise ValueError(f"the projector {call.name} makes {name} of more than one image")


def _makes(module: nn.Module, units: torch.Tensor, final_NH: torch.Tensor, ours: torch.Tensor) -> bool:
    """Says whether a projector makes these rows of these units, whatever other units are there."""
    try:
        with torch.no_grad():
            found = module(torch.cat((units, units))).flatten(0, -2)
    except (RuntimeError, ValueError):
        # A projector that needs a whole image refuses the shape of anything else.
        return False
    if len(found) != 2 * len(final_NH):
        return False
    wanted = final_NH[ours].float()
    halves = [half[ours].float() for half in found.split(len(final_NH))]
    limit = _TOLERANCE.get(final_NH.dtype, _COARSE) * wanted.norm()
    return all(bool((half - wanted).norm() <= limit) for half in halves)
