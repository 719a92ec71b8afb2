"""The model's processor or tokenizer, its fingerprint, and its padding token."""

from __future__ import annotations

import hashlib
import json
from copy import copy
from pathlib import Path
from typing import Any

from mmtune.errors import CapabilityError, DataError, IntegrityError, RecipeError
from mmtune.hub import look_here_without_hub


def load_processor(
    path: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    min_image_pixels: int | None = None,
    max_image_pixels: int | None = None,
) -> Any:
    """Returns the processor of a model, or its tokenizer when it takes text only.

    Args:
        path: Model folder or hub id.
        revision: Branch, tag or commit of a hub model.
        offline: Use the local cache only.
        min_image_pixels: Lower pixel budget per image, for processors that resize by a budget.
        max_image_pixels: Upper pixel budget, for the same.

    Raises:
        DataError: It asks to run code of its own.
        CapabilityError: It is not at hand, or needs a library that is not installed.
        RecipeError: The folder is not there or holds no processor or tokenizer, or a budget does not fit it.
        IntegrityError: One of its files is damaged.
    """
    check_folder(path)
    _refuse_own_code(Path(path))
    look_here_without_hub(path, offline)
    options: dict[str, Any] = {
        "revision": revision,
        "local_files_only": offline,
        "trust_remote_code": False,
    }
    try:
        processor = _load(path, options)
    except ImportError as error:
        raise CapabilityError(
            f"the processor of {path} needs a library that is not installed: {_first_line(error)}",
            "install it with pip",
            "missing_library",
        ) from error
    except json.JSONDecodeError as error:
        raise _damaged(f"a JSON file in {path}") from error
    except (OSError, ValueError, LookupError) as error:
        if isinstance(error, FileNotFoundError) and "temporary directory" in str(error):
            raise
        if isinstance(error, OSError) and not Path(path).is_dir():
            raise CapabilityError(
                f"the processor of {path!r} is not on this machine and the hub did not give it: {_first_line(error)}",
                "check the name and the network; a folder beside the recipe is written ./FOLDER",
                "model_unavailable",
            ) from error
        raise RecipeError(
            f"no processor or tokenizer can be loaded from {path}: {_first_line(error)}",
            "set model.path to a folder that holds tokenizer.json (and preprocessor_config.json), or a hub id",
            "processor_unavailable",
        ) from error
    if min_image_pixels or max_image_pixels:
        _set_pixel_budget(processor, min_image_pixels, max_image_pixels)
    return processor


def check_folder(path: str) -> None:
    """Raises RecipeError where a path that is no hub id names no folder."""
    if path.startswith((".", "/", "~")) and not Path(path).is_dir():
        raise RecipeError(
            f"the model folder {path} is not there",
            "check model.path in the recipe: a relative one is relative to the recipe's folder",
            "model_missing",
        )


def _damaged(what: str) -> IntegrityError:
    return IntegrityError(f"{what} is not valid JSON", "fetch the model again", "bad_processor")


def _load(path: str, options: dict[str, Any]) -> Any:
    from transformers import AutoProcessor

    from mmtune.models.composite import register

    register()
    try:
        return AutoProcessor.from_pretrained(path, **options)
    except ImportError as error:
        if "torchvision" not in str(error).lower():
            raise
        return _without_video(path, options, error)


def _set_pixel_budget(processor: Any, low: int | None, high: int | None) -> None:
    images = getattr(processor, "image_processor", None)
    size = dict(getattr(images, "size", None) or {})
    if images is None or not (size.get("shortest_edge") and size.get("longest_edge")):
        raise RecipeError(
            "tokenize.min_image_pixels and max_image_pixels do not fit this model: its images have no pixel budget",
            "remove them from the recipe",
            "no_pixel_budget",
        )
    kept = {"shortest_edge": low or size["shortest_edge"], "longest_edge": high or size["longest_edge"]}
    if kept["shortest_edge"] > kept["longest_edge"]:
        raise RecipeError(
            f"the least image size ({kept['shortest_edge']} pixels) is over the largest ({kept['longest_edge']})",
            "set tokenize.min_image_pixels below tokenize.max_image_pixels",
            "no_pixel_budget",
        )
    assert images is not None
    images.size = kept if isinstance(images.size, dict) else type(images.size)(**kept)


def same_processor(path: str, fingerprint: str | None, **options: Any) -> Any:
    """Returns the processor of a model, refusing another one than tokens/ was made with.

    Args:
        path: Model folder or hub id.
        fingerprint: Of the processor that made tokens/.
        options: As ``load_processor`` takes them.

    Raises:
        IntegrityError: It is another one.
    """
    processor = load_processor(path, **options)
    if processor_fingerprint(processor) != fingerprint:
        raise IntegrityError(
            "the processor is not the one that tokens/ was made with", "run: mmtune tokenize", "other_processor"
        )
    return processor


def tokenizer_of(processor: Any) -> Any:
    """Returns the tokenizer inside a processor, or the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def pad_token_id(processor: Any) -> int:
    """Returns the id that pads batches.

    Padding is masked and bears no loss, so where the tokenizer names no padding token its end
    token serves; the vocabulary is never resized for it.

    Raises:
        RecipeError: The tokenizer has neither a padding nor an end token.
    """
    tokenizer = tokenizer_of(processor)
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    raise RecipeError(
        "the tokenizer has neither a padding nor an end token",
        "set pad_token in tokenizer_config.json of the model folder",
        "no_pad_token",
    )


def processor_fingerprint(processor: Any) -> str:
    """Returns a sha256 over everything of a processor that decides ids and pixels."""
    tokenizer = tokenizer_of(processor)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts: dict[str, Any] = {
        "class": type(processor).__name__,
        "tokenizer": hashlib.sha256(backend.to_str().encode()).hexdigest() if backend else repr(tokenizer),
        "template": chat_template_of(processor),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    for name in ("image_processor", "feature_extractor", "audio_processor", "video_processor"):
        part = getattr(processor, name, None)
        if part is not None and hasattr(part, "to_dict"):
            parts[name] = part.to_dict()
    if getattr(processor, "items", None) is not None:
        parts["items"] = list(processor.items)
    if tokenizer is not processor:
        own = {name: value for name, value in vars(processor).items() if isinstance(value, int | float | str | bool)}
        parts["own"] = {name: value for name, value in own.items() if name != "chat_template"}
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def chat_template_of(processor: Any) -> str:
    """Returns the source text of the chat template.

    Raises:
        RecipeError: There is none.
    """
    found = getattr(processor, "chat_template", None)
    if found is None:
        found = getattr(tokenizer_of(processor), "chat_template", None)
    if isinstance(found, dict):
        found = found.get("default")
    if not found:
        raise RecipeError(
            "the model has no chat template, so conversations cannot be written for it",
            "choose an instruction-tuned variant, or put a chat_template.jinja into the model folder",
            "no_chat_template",
        )
    return str(found)


def _refuse_own_code(folder: Path) -> None:
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        file = folder / name
        if file.is_file():
            try:
                values = json.loads(file.read_text("utf-8"))
            except ValueError as error:
                raise _damaged(str(file)) from error
            if isinstance(values, dict) and values.get("auto_map"):
                raise DataError(
                    f"{file} asks to run code of its own (auto_map)",
                    "use a model whose classes are part of transformers",
                    "remote_code_refused",
                )


def _without_video(path: str, options: dict[str, Any], error: ImportError) -> Any:
    """Returns a processor without its video part, which torchvision would be needed for."""
    import transformers
    from transformers import AutoImageProcessor, AutoTokenizer, ProcessorMixin

    values = ProcessorMixin.get_processor_dict(path, **options)[0]
    name = values.get("processor_class") or ""
    cls = getattr(transformers, name, None)
    if not name:
        image = transformers.image_processing_base.ImageProcessingMixin.get_image_processor_dict(path, **options)[0]
        cls = getattr(transformers, image.get("processor_class") or "", None)
    if cls is None or "video_processor" not in cls.get_attributes():
        raise CapabilityError(
            f"the processor of {path} needs torchvision", "pip install torchvision", "missing_torchvision"
        ) from error
    parts: dict[str, Any] = {"tokenizer": AutoTokenizer.from_pretrained(path, **options)}
    if "image_processor" in cls.get_attributes():
        parts["image_processor"] = AutoImageProcessor.from_pretrained(path, **options)
    if "feature_extractor" in cls.get_attributes():
        parts["feature_extractor"] = transformers.AutoFeatureExtractor.from_pretrained(path, **options)
    return without_video(cls, values, **parts)


def without_video(cls: Any, values: dict[str, Any], **parts: Any) -> Any:
    """Returns a processor of a class whose video part is left out.

    Args:
        cls: A transformers processor class with a ``video_processor``.
        values: Its saved settings.
        parts: Tokenizer and the other sub-processors.
    """

    def check(self: Any, name: str, part: Any) -> Any:
        return None if part is None else cls.check_argument_for_proper_class(self, name, part)

    def save(self: Any, folder: str, **options: Any) -> Any:
        whole = copy(self)
        whole.__class__ = type(cls.__name__, (cls,), {"get_attributes": classmethod(lambda _: list(parts))})
        return cls.save_pretrained(whole, folder, **options)

    # transformers checks and saves every part; a missing video part is the one exception made here.
    lenient = type(cls.__name__, (cls,), {"check_argument_for_proper_class": check, "save_pretrained": save})
    known = {key: value for key, value in values.items() if key in _init_names(cls)}
    known.setdefault("chat_template", getattr(parts["tokenizer"], "chat_template", None))
    return lenient(video_processor=None, **parts, **known)


def _init_names(cls: Any) -> set[str]:
    import inspect

    attributes = set(cls.get_attributes())
    return {name for name in inspect.signature(cls.__init__).parameters if name not in attributes} - {"self", "kwargs"}


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
