"""One image, sound, text or history to the arrays that an encoder takes, without the encoder's weights.

Worker processes do this. Every array keeps the batch dimension of one, so that batches are joined along the first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmtune.errors import CapabilityError, RecipeError
from mmtune.hub import look_here_without_hub

Kind = Literal["image", "audio", "text", "behaviour"]
Inputs = dict[str, np.ndarray]
ITEMS = "items.json"
"""File of a history encoder's folder: the known items as a JSON list; the id of the first is 3."""
PADDING, UNKNOWN_ITEM, NO_ITEM, FIRST_ITEM = 0, 1, 2, 3
"""Ids of a history: what fills a batch up, an item that is not known, a history without any, the first known item."""
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")
# What a processor reads besides weights and config.
_PROCESSOR_FILES = ("*.json", "*.jinja", "*.txt", "*.model")


@dataclass(frozen=True)
class Preparation:
    """How what a person gave becomes an encoder's inputs.

    Attributes:
        inputs: An RGB image, mono float32 samples, a text or a sequence of items to arrays of a batch of one.
        sampling_rate_hz: That sounds must have; 0 for other kinds.
        longest_samples: Of a sound, of which more would be cut off; 0 where nothing is.
    """

    inputs: Callable[[Any], Inputs]
    sampling_rate_hz: int = 0
    longest_samples: int = 0


def load_preparation(path: str, kind: Kind, *, revision: str | None = None, offline: bool = False) -> Preparation:
    """Returns the preparation of an encoder's folder or hub id, by its own processor.

    Raises:
        CapabilityError: The processor is not at hand, or needs something that is not installed.
        RecipeError: The folder holds no processor of this kind.
    """
    options: dict[str, Any] = {"revision": revision, "local_files_only": offline, "trust_remote_code": False}
    if kind == "behaviour":
        return Preparation(partial(history_inputs, known_items(Path(path))))
    look_here_without_hub(path, offline)
    processor = _load(path, kind, options)
    if kind == "image":
        return Preparation(partial(_image, processor))
    if kind == "audio":
        return Preparation(partial(_audio, processor), int(processor.sampling_rate), longest_sound(processor))
    return Preparation(partial(_text, processor, _longest(path, processor, options)))


def _load(path: str, kind: Kind, options: dict[str, Any]) -> Any:
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    if kind == "audio":
        # The feature extractor of the small encoder becomes known; its module is slow to import.
        import mmtune.models.encoders  # noqa: F401

    if kind == "text" and lacks_tokenizer(path):
        raise _no_processor(path, kind, "there is no tokenizer.json")
    auto: Any = {"image": AutoImageProcessor, "audio": AutoFeatureExtractor, "text": AutoTokenizer}[kind]
    try:
        return auto.from_pretrained(path, **options)
    except ImportError as error:
        raise CapabilityError(
            f"the {kind} processor of {path} needs a library that is not installed: {_first_line(error)}",
            "install it with pip",
            "missing_library",
        ) from error
    except (OSError, ValueError, LookupError) as error:
        if isinstance(error, OSError) and not Path(path).is_dir():
            raise CapabilityError(
                f"the {kind} processor of {path!r} is not on this machine and the hub did not give it:"
                f" {_first_line(error)}",
                "check the name and the network, or name a folder on this machine",
                "model_unavailable",
            ) from error
        raise _no_processor(path, kind, _first_line(error)) from error


def longest_sound(extractor: Any) -> int:
    """Returns the samples of the longest sound that a feature extractor takes whole; 0 where there is no longest.

    Whisper's and AST's cut the rest off without a word.
    """
    if hasattr(extractor, "nb_max_frames"):
        return int(extractor.n_samples)
    if type(extractor).__name__ == "ASTFeatureExtractor":
        # Kaldi's frames: 25 ms every 10 ms, and what is too short for one more is not heard anywhere.
        window, hop = (extractor.sampling_rate * milliseconds // 1000 for milliseconds in (25, 10))
        return int(window + extractor.max_length * hop - 1)
    return 0


def lacks_tokenizer(path: str) -> bool:
    """Says whether a folder has no tokenizer: transformers would make an empty one from the config alone."""
    folder = Path(path)
    return folder.is_dir() and not any(next(folder.glob(name), None) for name in _TOKENIZER_FILES)


def _no_processor(path: str, kind: str, why: str) -> RecipeError:
    return RecipeError(
        f"{path} holds no {kind} processor: {why}",
        f"name an encoder for {kind}: --set extract.encoders.{kind}=FOLDER_OR_HUB_ID",
        "processor_unavailable",
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def _image(processor: Any, image: Any) -> Inputs:
    made = processor(images=[image], return_tensors="np")
    return {name: np.asarray(value) for name, value in made.items()}


def _audio(processor: Any, samples: np.ndarray) -> Inputs:
    made = processor(
        [samples], sampling_rate=processor.sampling_rate, return_tensors="np", return_attention_mask=_masks(processor)
    )
    return {name: np.asarray(value) for name, value in made.items()}


def _masks(processor: Any) -> bool:
    # Whisper always fills 30 s and its encoder does not look at the mask; it tells where the sound ends.
    return bool(getattr(processor, "return_attention_mask", True) or hasattr(processor, "nb_max_frames"))


def _text(tokenizer: Any, longest: int | None, text: str) -> Inputs:
    made = tokenizer(text, truncation=longest is not None, max_length=longest, return_attention_mask=True)
    ids = list(made["input_ids"]) or [_end(tokenizer)]
    return _ids(ids)


def _end(tokenizer: Any) -> int:
    found = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return next((one for one in found if one is not None), 0)


def _longest(path: str, tokenizer: Any, options: dict[str, Any]) -> int | None:
    """Returns the tokens that model and tokenizer can take, or None where nothing limits them."""
    from mmtune.models.load import load_config

    config = load_config(path, revision=options["revision"], offline=options["local_files_only"]).get_text_config()
    places = getattr(config, "max_position_embeddings", None)
    # RoBERTa's positions begin behind the padding id.
    if places and config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        places -= (config.pad_token_id or 0) + 1
    known = [int(one) for one in (places, tokenizer.model_max_length) if one and one < 10**9]
    return min(known) if known else None


def known_items(folder: Path) -> dict[str, int]:
    """Returns item to id, as a history encoder's folder lists them.

    Raises:
        RecipeError: There is no list.
    """
    file = folder / ITEMS
    if not file.is_file():
        raise RecipeError(f"{folder} has no {ITEMS}", "name a folder that mmtune extract wrote", "no_items")
    return item_ids(json.loads(file.read_text("utf-8")))


def item_ids(items: Sequence[str]) -> dict[str, int]:
    """Returns item to id; ids below ``FIRST_ITEM`` are padding, the unknown item and the empty history."""
    return {item: number for number, item in enumerate(items, FIRST_ITEM)}


def history_inputs(ids: Mapping[str, int], items: Sequence[str]) -> Inputs:
    """Returns the inputs of a history, oldest first: an item that is not known is 1, an empty history the one id 2."""
    found = [ids.get(item, UNKNOWN_ITEM) for item in items] or [NO_ITEM]
    return _ids(found)


def _ids(ids: Sequence[int]) -> Inputs:
    return {"input_ids": np.asarray([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}


def processor_digest(path: str) -> str:
    """Returns a sha256 over the files of a folder that a processor reads; empty for a hub id, whose commit tells."""
    folder = Path(path)
    if not folder.is_dir():
        return ""
    total = hashlib.sha256()
    for file in sorted({file for pattern in _PROCESSOR_FILES for file in folder.glob(pattern)}):
        total.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()
