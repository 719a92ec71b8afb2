"""What a frozen vision tower and projector make of images, apart from the training step.

transformers' models take it as ``mm_encoder_outputs`` in place of pixels.

Shapes: N image tokens, H model width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from mmtune.models.towers import tower_of

FEATURES = "image_features"
_DEEPSTACK = "image_deepstack_"
_IMAGE_TOWERS = ("vision", "projector")


def trains_on_pixels(model: Any) -> str:
    """Returns why a model's image features change while it trains or cannot stand for pixels; empty when they can."""
    base = _base(model)
    if (
        not hasattr(base, "get_image_features")
        or "mm_encoder_outputs" not in inspect.signature(base.forward).parameters
    ):
        return "this family takes no image features in place of pixels"
    if getattr(base.config, "projectors", {}).get("image", {}).get("instruction"):
        return "the resampler reads the instruction with the image"
    trained = {tower_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = [tower for tower in _IMAGE_TOWERS if tower in trained]
    return f"{' and '.join(found)} train" if found else ""


def image_features(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the features of images by name, each with one row per image token, in order.

    ``image_features`` is ``(N, H)``, or ``(N, 1, H)`` in a family whose model takes one tensor
    where others take a list; with it the features of deeper layers, ``(N, H)`` each, where a family has them.

    Args:
        model: In evaluation mode.
        tensors: What the processor made of the images.
    """
    base = _base(model)
    known = inspect.signature(base.get_image_features).parameters
    with torch.no_grad():
        made = base.get_image_features(
            **{name: value for name, value in tensors.items() if name in known}, return_dict=True
        )
    pooled = made.pooler_output
    flat = pooled.flatten(0, -2)[:, None] if torch.is_tensor(pooled) else _rows(pooled)
    deep = getattr(made, "deepstack_features", None) or ()
    return {FEATURES: flat} | {f"{_DEEPSTACK}{index}": _rows(layer) for index, layer in enumerate(deep)}


def feature_width(model: Any) -> int:
    """Returns the numbers that one image token's features hold, deeper layers counted."""
    config = _base(model).config
    vision = getattr(config, "vision_config", None)
    deep = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    return int(config.get_text_config().hidden_size) * (1 + deep)


def with_encoder_outputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a model's inputs in which features, if there are any, stand as ``mm_encoder_outputs``."""
    if FEATURES not in inputs:
        return dict(inputs)
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    pooled: Any = inputs[FEATURES]
    shown: Any = pooled.transpose(0, 1) if pooled.ndim == 3 else [pooled]
    made = BaseModelOutputWithPooling(pooler_output=shown)
    deep = sorted(
        (name for name in inputs if name.startswith(_DEEPSTACK)), key=lambda name: int(name[len(_DEEPSTACK) :])
    )
    if deep:
        made.deepstack_features = [[inputs[name]] for name in deep]
    rest = {name: value for name, value in inputs.items() if name != FEATURES and name not in deep}
    return {**rest, "mm_encoder_outputs": {"image": made}}


Released = list[tuple[torch.nn.Module, str, torch.nn.Parameter]]


def release_image_towers(model: Any) -> Released:
    """Takes the weights of the vision tower and its projector out of the model; returns where they were.

    The model then takes features alone. Their memory is free once what is returned is dropped.
    """
    released: Released = []
    for name, module in _base(model).named_modules():
        if tower_of(name) in _IMAGE_TOWERS and "audio" not in name:
            for own, parameter in list(module.named_parameters(recurse=False)):
                released.append((module, own, parameter))
                setattr(module, own, torch.nn.Parameter(parameter.data.to("meta"), requires_grad=False))
    return released


def put_back(released: Released) -> None:
    """Gives the model its released weights back."""
    for module, own, parameter in released:
        setattr(module, own, parameter)


def tower_types(model: Any) -> list[str]:
    """Returns the types of the weights that make the features."""
    found = {str(p.dtype) for name, p in _base(model).named_parameters() if tower_of(name) in _IMAGE_TOWERS}
    return sorted(found)


def _rows(parts: Any) -> torch.Tensor:
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
