"""The language model and the towers inside a multimodal model, as parts to make another one of."""

from __future__ import annotations

from typing import Any

from mmtune.errors import CapabilityError


def is_multimodal(config: Any) -> bool:
    """Says whether a config is that of a model that reads media and writes text."""
    from transformers import AutoModelForImageTextToText

    return type(config) in AutoModelForImageTextToText._model_mapping


def alone(model: Any) -> Any:
    """Returns the language model inside a multimodal model, with its head; any other model as it is.

    Raises:
        CapabilityError: It is of a kind that is not known by itself.
    """
    from transformers import AutoModelForCausalLM

    text = model.config.get_text_config()
    if text is model.config:
        return model
    text.tie_word_embeddings = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    try:
        language: Any = AutoModelForCausalLM.from_config(text, dtype=model.dtype)
    except ValueError as error:
        raise CapabilityError(
            f"the language model inside {type(model).__name__} is not known by itself",
            "name a causal language model",
            "model_unsupported",
        ) from error
    language.base_model.load_state_dict(model.get_decoder().state_dict())
    language.get_output_embeddings().load_state_dict(model.get_output_embeddings().state_dict())
    return language


def tower_of_model(path: str, name: str, offline: bool) -> Any:
    """Returns a tower of a multimodal model, with its config.

    Args:
        path: Folder or hub id.
        name: What transformers calls it, such as ``vision_tower``.
        offline: Never reach for the network.

    Raises:
        CapabilityError: The model has none of that name.
    """
    from mmtune.models.load import load_model

    model: Any = load_model(path, offline=offline)
    tower = getattr(model.base_model, name, None)
    if tower is None:
        raise CapabilityError(f"{type(model).__name__} has no {name} to take", "name an encoder", "model_unsupported")
    return tower
