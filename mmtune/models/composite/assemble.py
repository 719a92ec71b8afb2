"""Unimodal parts, pretrained or fresh, to one composite model and its processor."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmtune.errors import CapabilityError, RecipeError
from mmtune.models.composite.config import TOWERS
from mmtune.models.composite.parts import alone, is_multimodal, tower_of_model
from mmtune.models.inputs import FIRST_ITEM, known_items, lacks_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from mmtune.models.composite.model import CompositeForConditionalGeneration
    from mmtune.models.composite.processor import CompositeProcessor

TOKENS = {name: f"<{name}>" for name in TOWERS}
_LAYERS = {
    "image": ("vision_feature_layer", "vision_feature_select_strategy"),
    "audio": ("audio_feature_layer",),
    "behaviour": (),
}
_INPUTS = {"image": {"pixel_values"}, "audio": {"input_features", "input_values"}, "behaviour": {"input_ids"}}
_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_NORMAL = ("image_mean", "image_std")


def assemble(
    text: str | PretrainedConfig,
    *,
    encoders: Mapping[str, str | PretrainedConfig],
    projectors: Mapping[str, Mapping[str, Any]] | None = None,
    fusion: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    preprocessors: Mapping[str, Any] | None = None,
    offline: bool = False,
    **settings: Any,
) -> tuple[CompositeForConditionalGeneration, CompositeProcessor]:
    """Returns a composite model in evaluation mode, and its processor.

    Projectors and what fuses are fresh; a part that is given as a config is fresh too. The tokenizer gets a token
    per modality where it has none, and the language model rows for them (the mean of the others).

    Args:
        text: Folder or hub id of a causal language model, or its config; of a multimodal model its language model is
            taken.
        encoders: ``image``, ``audio`` and ``behaviour`` to a folder or hub id of an encoder, or its config; of a
            multimodal model its tower is taken.
        projectors: As in ``CompositeConfig``.
        fusion: As in ``CompositeConfig``.
        tokenizer: Of the language model, where ``text`` is a config.
        preprocessors: ``image`` and ``audio`` to what makes them ready, ``behaviour`` to the items in the order of
            their ids; else that of the encoder's folder, or the plain one for its config.
        offline: Never reach for the network.
        settings: Others of ``CompositeConfig``.

    Raises:
        RecipeError: Parts do not fit each other.
        CapabilityError: A part is not at hand, or of an unknown kind.
    """
    from mmtune.models.composite import register
    from mmtune.models.composite.config import CompositeConfig
    from mmtune.models.composite.encoders import convolutions_of
    from mmtune.models.composite.model import CompositeForConditionalGeneration

    register()
    unknown = sorted(set(encoders) - set(TOKENS))
    if unknown or not encoders:
        raise RecipeError(
            f"there is no encoder of {', '.join(unknown) or 'nothing'}",
            f"name some of {', '.join(TOKENS)}; a video is images",
            "no_such_encoder",
        )
    language = _language_model(text, offline)
    tokenizer = deepcopy(tokenizer) if tokenizer is not None else _tokenizer(text, offline)
    parts = {modality: _encoder(modality, source, offline) for modality, source in encoders.items()}
    given = dict(preprocessors or {})
    given |= {name: _preprocessor(name, encoders[name], offline) for name in encoders if name not in given}
    added = {"additional_special_tokens": [TOKENS[name] for name in parts]}
    tokenizer.add_special_tokens(added, replace_extra_special_tokens=False)
    _make_room(language, len(tokenizer))
    audio = parts.get("audio")
    config = CompositeConfig(
        text_config=language.config.get_text_config(),
        **{f"{TOWERS[modality]}_config": part.config for modality, part in parts.items()},
        **{f"{modality}_token_id": tokenizer.convert_tokens_to_ids(TOKENS[modality]) for modality in parts},
        audio_convolutions=None if audio is None else convolutions_of(audio.config),
        projectors={name: dict(own) for name, own in (projectors or {}).items()},
        fusion=dict(fusion or {}),
        **{"frame_times": "image" in parts, **_last_of_stages(parts), **_as_before(encoders, offline), **settings},
    )
    model = CompositeForConditionalGeneration(config)
    _fill(model, language, parts)
    return model.eval(), _processor(model, tokenizer, given)


def _last_of_stages(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns that the last layer is read of an image encoder whose layers are of several widths."""
    from mmtune.models.composite.encoders import has_stages

    return {"vision_feature_layer": None} if "image" in parts and has_stages(parts["image"].config) else {}


def _language_model(text: str | PretrainedConfig, offline: bool) -> Any:
    from transformers import AutoModelForCausalLM

    if not isinstance(text, str):
        return AutoModelForCausalLM.from_config(deepcopy(text), dtype=torch.float32)
    from mmtune.models.load import load_model

    return alone(load_model(text, offline=offline))


def _tokenizer(text: str | PretrainedConfig, offline: bool) -> Any:
    if not isinstance(text, str):
        raise RecipeError("a language model from a config has no tokenizer", "give one", "no_tokenizer")
    from transformers import AutoTokenizer

    if lacks_tokenizer(text):
        raise RecipeError(
            f"the language model {text} has no tokenizer: there is no tokenizer.json",
            "save its tokenizer there",
            "no_tokenizer",
        )
    return AutoTokenizer.from_pretrained(text, local_files_only=offline, trust_remote_code=False)


def _as_before(encoders: Mapping[str, str | PretrainedConfig], offline: bool) -> dict[str, Any]:
    """Returns which layers of their towers multimodal models read, so that they are read again."""
    from mmtune.models.load import load_config

    found: dict[str, Any] = {}
    for modality, source in encoders.items():
        config: Any = load_config(source, offline=offline) if isinstance(source, str) else None
        if config is not None and is_multimodal(config):
            names = [name for name in _LAYERS[modality] if hasattr(config, name)]
            found |= {name: getattr(config, name) for name in names}
    return found


def _encoder(modality: str, source: str | PretrainedConfig, offline: bool) -> Any:
    """Returns the encoder as a module with its config."""
    from transformers import AutoModel

    from mmtune.models.composite.encoders import build_encoder
    from mmtune.models.load import load_config

    if not isinstance(source, str):
        return _of_modality(build_encoder(deepcopy(source)), modality, source.model_type)
    config: Any = load_config(source, offline=offline)
    if is_multimodal(config):
        return tower_of_model(source, f"{TOWERS[modality]}_tower", offline)
    # Of CLIP and its like, the tower of the modality alone.
    config = getattr(config, f"{TOWERS[modality]}_config", None) or config
    try:
        model = AutoModel.from_pretrained(
            source, config=config, dtype=torch.float32, use_safetensors=True, local_files_only=offline
        )
    except (OSError, ValueError) as error:
        raise CapabilityError(
            f"the {modality} encoder {source!r} cannot be loaded: {str(error).splitlines()[0]}",
            "check the name, and that it has safetensors",
            "model_unavailable",
        ) from error
    return _of_modality(model.get_encoder() if config.is_encoder_decoder else model, modality, source)


def _of_modality(encoder: Any, modality: str, name: str) -> Any:
    """Returns the encoder, unless it takes other things than those of the modality, or more, or has no one width."""
    from mmtune.models.composite.encoders import encoder_width

    parameters = inspect.signature(encoder.forward).parameters
    takes, wanted = set(parameters), _INPUTS[modality]
    other = sorted(takes & (set().union(*_INPUTS.values()) | {"input_ids"}) - wanted)
    if other and not takes & wanted:
        raise RecipeError(
            f"{name} is no encoder of {modality}: {type(encoder).__name__} takes {other[0]}",
            f"name one that takes {' or '.join(sorted(wanted))}",
            "other_modality",
        )
    needs = [name for name, own in parameters.items() if own.default is own.empty and own.kind not in _STARRED]
    more = [name for name in needs if name not in wanted]
    if more or not encoder_width(encoder.config):
        why = f"wants {' and '.join(more)} too" if more else "names no width of what it makes"
        raise CapabilityError(
            f"{name} cannot be the {modality} encoder of a composite model: {type(encoder).__name__} {why}",
            "choose another one, such as CLIP, SigLIP, DINOv2 or ViT for images, Whisper or wav2vec2 for sounds",
            "encoder_unsupported",
        )
    return encoder


def _preprocessor(modality: str, source: str | PretrainedConfig, offline: bool) -> Any:
    import transformers

    from mmtune.models.log_mel import LogMelFeatureExtractor

    if modality == "behaviour":
        return _items(source, offline) if isinstance(source, str) else None
    if isinstance(source, str):
        auto: Any = transformers.AutoImageProcessor if modality == "image" else transformers.AutoFeatureExtractor
        try:
            return auto.from_pretrained(source, local_files_only=offline)
        except (OSError, ValueError) as error:
            named = "an image processor" if modality == "image" else "a feature extractor of sounds"
            # What transformers says lists all model types that it knows.
            raise RecipeError(
                f"the {modality} encoder {source} has no preprocessor_config.json of {named}",
                f"name an encoder of {modality}, or save {named} beside it",
                "no_preprocessor",
            ) from error
    config: Any = source
    if modality == "image":
        edge = config.image_size
        size, channels = {"height": edge, "width": edge}, getattr(config, "num_channels", 3)
        normal: Any = {
            name: [value] * channels for name in _NORMAL if (value := getattr(config, name, None)) is not None
        }
        return transformers.CLIPImageProcessor(size=size, crop_size=size, **normal)
    if config.model_type == "whisper":
        seconds = config.max_source_positions * 2 * 160 // 16_000
        return transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=seconds)
    if config.model_type == "mmtune_log_mel":
        names = ("sampling_rate", "n_fft", "hop_length", "mel_mean", "mel_std")
        return LogMelFeatureExtractor(config.num_mel_bins, **{name: getattr(config, name) for name in names})
    return None


def _items(source: str, offline: bool) -> list[str]:
    """Returns the items that an encoder of histories knows, in the order of their ids."""
    from mmtune.models.composite.processor import CompositeProcessor
    from mmtune.models.load import load_config

    if is_multimodal(load_config(source, offline=offline)):
        return CompositeProcessor.from_pretrained(source, local_files_only=offline).items or []
    return list(known_items(Path(source)))


def _make_room(language: Any, tokens: int) -> None:
    """Gives the language model rows for new tokens, each the mean of the old ones."""
    old = language.get_input_embeddings().weight.shape[0]
    if tokens <= old:
        return
    language.resize_token_embeddings(tokens, mean_resizing=False)
    for embeddings in (language.get_input_embeddings(), language.get_output_embeddings()):
        with torch.no_grad():
            embeddings.weight[old:] = embeddings.weight[:old].mean(0)


def _fill(model: Any, language: Any, parts: Mapping[str, Any]) -> None:
    """Copies the weights of the parts into the model."""
    head = language.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise CapabilityError(
            f"{type(language).__name__} has a bias in its head, which the composite model has not",
            "choose another language model",
            "model_unsupported",
        )
    model.model.language_model.load_state_dict(language.base_model.state_dict())
    model.lm_head.load_state_dict(head.state_dict())
    for modality, part in parts.items():
        getattr(model.model, f"{TOWERS[modality]}_tower").load_state_dict(part.state_dict())


def _processor(model: Any, tokenizer: Any, given: Mapping[str, Any]) -> Any:
    from mmtune.models.composite.processor import CompositeProcessor
    from mmtune.models.composite.template import template_of

    config = model.config
    for modality in config.modalities:
        if given.get(modality) is None:
            raise RecipeError(
                f"nothing makes {modality} ready for its encoder", f"give preprocessors.{modality}", "no_preprocessor"
            )
    if "behaviour" in given and FIRST_ITEM + len(given["behaviour"]) > config.behaviour_config.vocab_size:
        raise RecipeError(
            f"the behaviour encoder has {config.behaviour_config.vocab_size:,} ids, too few for"
            f" {len(given['behaviour']):,} items",
            "name the items that it was made for",
            "parts_do_not_fit",
        )
    fixed = config.projectors.get("audio", {}).get("queries")
    if fixed is None and "audio" in config.modalities and config.audio_convolutions is None:
        fixed = _sound_tokens(model, given["audio"])
    return CompositeProcessor(
        tokenizer,
        image_processor=given.get("image"),
        feature_extractor=given.get("audio"),
        chat_template=template_of(tokenizer, {name: TOKENS[name] for name in config.modalities}),
        image_tokens=_image_tokens(model, given["image"]) if "image" in config.modalities else 0,
        audio_tokens=fixed,
        audio_convolutions=config.audio_convolutions,
        items=given.get("behaviour"),
        history_items=_longest_history(config.behaviour_config),
        behaviour_tokens=config.projectors.get("behaviour", {}).get("queries"),
        frame_times=config.frame_times,
        reads_prompt=config.reads_prompt,
    )


def _longest_history(config: Any) -> int | None:
    """Returns the items that an encoder of histories tells apart; None where nothing limits them, or without one."""
    names = ("window", "max_position_embeddings")
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _image_tokens(model: Any, images: Any) -> int:
    """Returns how many tokens an image takes, by trying a wide and a tall one."""
    from PIL import Image

    counts = set()
    for size in ((64, 48), (48, 160)):
        pixels = images(Image.new("RGB", size), return_tensors="pt")["pixel_values"]
        try:
            with torch.no_grad():
                features = model.get_image_features(pixels, instruction=_no_instruction(model))
        except (RuntimeError, ValueError) as error:
            raise RecipeError(
                f"the image encoder refuses what its image processor makes: {str(error).splitlines()[0]}",
                "give an image processor of the encoder's size",
                "parts_do_not_fit",
            ) from error
        counts |= {len(own) for own in features.pooler_output}
    if len(counts) > 1:
        raise RecipeError(
            "the image processor makes images of different sizes", "set its size to one height and width", "no_one_size"
        )
    return counts.pop()


def _sound_tokens(model: Any, sounds: Any) -> int:
    made = sounds([torch.zeros(sounds.sampling_rate).numpy()], sampling_rate=sounds.sampling_rate, return_tensors="pt")
    inputs = made["input_features"] if "input_features" in made else made["input_values"]
    with torch.no_grad():
        return len(model.get_audio_features(inputs, instruction=_no_instruction(model)).pooler_output[0])


def _no_instruction(model: Any) -> torch.Tensor:
    return torch.zeros(1, model.config.text_config.hidden_size)
