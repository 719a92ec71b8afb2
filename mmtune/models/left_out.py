"""Tower weights that are not in memory: frozen ones whose outputs are kept. They stand as meta tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmtune.models.encoder_outputs import base_of
from mmtune.models.towers import tower_of

if TYPE_CHECKING:
    from collections.abc import Iterator

_TOWER = {"image": "vision", "audio": "audio", "behaviour": "behaviour"}
# What a projector's name says of the media that go through it.
_WORDS = {"image": ("vis", "image"), "audio": ("audio", "speech"), "behaviour": ("behaviour",)}

Released = list[tuple[nn.Module, str, nn.Parameter]]


def tower_weights(model: nn.Module, kinds: Collection[str], *, with_projector: bool) -> set[str]:
    """Returns the names of the weights that nothing but media of some kinds goes through.

    Args:
        model: A transformers model.
        kinds: ``image``, ``audio`` or both.
        with_projector: The projector too, where its media are known.
    """
    names = [name for name, _ in model.named_parameters()]
    towers = {tower_of(name) for name in names}
    present = [kind for kind, tower in _TOWER.items() if tower in towers]

    def kind_of(name: str) -> str:
        tower = tower_of(name)
        own = [kind for kind, known in _TOWER.items() if known == tower]
        if tower != "projector" or not with_projector:
            return own[0] if own else ""
        said = [kind for kind, words in _WORDS.items() if any(word in name for word in words)]
        return next((found[0] for found in (said, present) if len(found) == 1), "")

    return {name for name in names if kind_of(name) in kinds}


def release(model: Any, kinds: Collection[str], *, with_projector: bool) -> Released:
    """Takes the weights of frozen towers out of the model; returns where they were.

    Their memory is free once what is returned is dropped.
    """
    base = base_of(model)
    return _take(base, tower_weights(base, kinds, with_projector=with_projector))


def put_back(released: Released) -> None:
    """Gives the model its released weights back."""
    for module, own, parameter in released:
        setattr(module, own, parameter)


def built_without(cls: Any, names_in: Callable[[nn.Module], Collection[str]]) -> Any:
    """Returns a class that builds ``cls`` without some of its weights, so that nothing is read into them.

    ``finish`` turns what it built into an ordinary ``cls``.

    Args:
        cls: A transformers class.
        names_in: A model to the names of the weights that it goes without.
    """

    def build(self: Any, config: Any, *more: Any, **named: Any) -> None:
        cls.__init__(self, config, *more, **named)
        names = sorted(names_in(self))
        self.left_out = _take(self, names)
        tied = self.all_tied_weights_keys
        self.all_tied_weights_keys = {one: other for one, other in tied.items() if not {one, other} & set(names)}
        known = self._keys_to_ignore_on_load_unexpected or ()
        self._keys_to_ignore_on_load_unexpected = {*known, *(f"^{re.escape(name)}$" for name in names)}
        _spare_first_values(self, set(names))
        for module, own, _ in self.left_out:
            setattr(module, own, None)

    return type(cls.__name__, (cls,), {"__init__": build, "__module__": cls.__module__})


def _spare_first_values(model: nn.Module, names: set[str]) -> None:
    """Tells transformers that modules whose weights are left out need no first values, as if a file had had them."""
    for prefix, module in model.named_modules():
        inside = {f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters()}
        direct = {f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)}
        whole = bool(inside) and inside <= names
        for part in module.modules() if whole else [module] if direct & names else []:
            part._is_hf_initialized = True


def finish(model: Any, cls: Any) -> None:
    """Makes what ``built_without`` built an ordinary model, its absent weights meta tensors, in place."""
    left_out = model.left_out
    del model.left_out, model._keys_to_ignore_on_load_unexpected
    model.__class__ = cls
    for module, own, parameter in left_out:
        meta = torch.empty_like(parameter, device="meta")
        setattr(module, own, nn.Parameter(meta, requires_grad=False))


def bring_back(
    model: Any, load: Callable[[Callable[[nn.Module], Collection[str]]], Any], kinds: Collection[str] = tuple(_TOWER)
) -> None:
    """Reads the absent weights of a model again, in place.

    Args:
        model: The model.
        load: Loads the same base without the weights that its argument names.
        kinds: Whose towers.
    """
    base = base_of(model)
    absent = {name for name, parameter in base.named_parameters() if parameter.is_meta}
    absent &= tower_weights(base, kinds, with_projector=True)
    if not absent:
        return
    found = load(lambda built: {name for name, _ in built.named_parameters()} - absent)
    device = next(parameter.device for parameter in base.parameters() if not parameter.is_meta)
    for name in absent:
        owner, _, own = name.rpartition(".")
        weights = found.get_parameter(name).data.to(device)
        setattr(base.get_submodule(owner), own, nn.Parameter(weights, requires_grad=False))
    # A tower that was built without its weights has buffers without values.
    own_buffers = dict(base.named_buffers())
    for name, buffer in found.named_buffers():
        if tower_of(name) in {_TOWER[kind] for kind in kinds}:
            own_buffers[name].copy_(buffer)


@contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """Hides meta tensors while the model moves to a device, which they cannot."""
    absent = _take(model, {name for name, parameter in model.named_parameters() if parameter.is_meta})
    for module, own, _ in absent:
        setattr(module, own, None)
    try:
        yield
    finally:
        put_back(absent)


def _take(model: nn.Module, names: Iterable[str]) -> Released:
    taken: Released = []
    for name in sorted(names):
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        parameter = module.get_parameter(own)
        taken.append((module, own, parameter))
        setattr(module, own, nn.Parameter(parameter.data.to("meta"), requires_grad=False))
    return taken
