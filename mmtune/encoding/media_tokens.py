"""How many tokens a medium takes, from its header alone.

A family's processor writes the text that stands for one medium (``replace_image_token``)
from a few facts of the processed pixels: a grid, a size, a number of crops. These facts
follow from width and height, so a stub of them is enough and no pixel is touched. A family
without a stub below is asked with a blank image of that size.
"""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from mmtune.encoding.refused import Refused
from mmtune.models.inputs import longest_sound
from mmtune.records import Medium

Stub = dict[str, Any]
_CACHE_SIZE = 8192


def _qwen_grid(processor: Any, height: int, width: int, alone: bool) -> Stub:
    own = processor.image_processor
    resize = sys.modules[type(own).__module__].smart_resize
    tall, wide = resize(
        height,
        width,
        own.patch_size * own.merge_size,
        min_pixels=own.size["shortest_edge"],
        max_pixels=own.size["longest_edge"],
    )
    grid = (1, tall // own.patch_size, wide // own.patch_size)
    return {"image_grid_thw": [np.array(grid)]}


def _fixed_size(own: Any) -> tuple[int, int] | None:
    """Returns (height, width) of every processed image, or None when it varies."""
    if getattr(own, "do_center_crop", False) and own.crop_size:
        return int(own.crop_size["height"]), int(own.crop_size["width"])
    size = dict(own.size) if getattr(own, "do_resize", False) and own.size else {}
    if size.get("height") and size.get("width"):
        return int(size["height"]), int(size["width"])
    return None


def _llava(processor: Any, height: int, width: int, alone: bool) -> Stub | None:
    size = _fixed_size(processor.image_processor)
    if size is None:
        return None
    return {"pixel_values": [np.broadcast_to(np.uint8(0), (3, *size))]}


def _tile_size(own: Any) -> tuple[int, int] | None:
    """Returns (height, width) of the tiles that an any-resolution processor cuts."""
    fixed = _fixed_size(own)
    edge = dict(own.size).get("shortest_edge")
    return fixed or ((int(edge), int(edge)) if edge else None)


def _any_resolution(processor: Any, height: int, width: int, alone: bool) -> Stub | None:
    size = _tile_size(processor.image_processor)
    if size is None:
        return None
    tile = np.broadcast_to(np.uint8(0), (3, *size))
    return {
        "pixel_values": [[tile]],
        "image_sizes": [[height, width]],
        "batch_num_images": [1 if alone else 2],
    }


def _rows_and_columns(processor: Any, height: int, width: int, alone: bool) -> Stub:
    asked = processor._merge_kwargs()["images_kwargs"]
    _, rows, columns = processor.image_processor.get_number_of_image_patches(height, width, asked)
    return {"rows": [[rows]], "cols": [[columns]]}


def _patches(processor: Any, height: int, width: int, alone: bool) -> Stub:
    asked = processor._merge_kwargs()["images_kwargs"]
    count = processor.image_processor.get_number_of_image_patches(height, width, asked)
    return {"num_patches": [count]}


def _whole_image(processor: Any, height: int, width: int, alone: bool) -> Stub | None:
    asked = processor._merge_kwargs()["images_kwargs"]
    scan = asked.get("do_pan_and_scan", getattr(processor.image_processor, "do_pan_and_scan", False))
    return None if scan else {"num_crops": [0]}


def _always_the_same(processor: Any, height: int, width: int, alone: bool) -> Stub:
    return {}


_IMAGE_STUBS: dict[str, Callable[[Any, int, int, bool], Stub | None]] = {
    "Qwen2VLProcessor": _qwen_grid,
    "Qwen2_5_VLProcessor": _qwen_grid,
    "Qwen3VLProcessor": _qwen_grid,
    "Qwen2_5OmniProcessor": _qwen_grid,
    "LlavaProcessor": _llava,
    "LlavaNextProcessor": _any_resolution,
    "LlavaOnevisionProcessor": _any_resolution,
    "Idefics3Processor": _rows_and_columns,
    "SmolVLMProcessor": _rows_and_columns,
    "InternVLProcessor": _patches,
    "Gemma3Processor": _whole_image,
    "CompositeProcessor": _always_the_same,
}


def _whisper_tokens(processor: Any, samples: int) -> dict[str, Any]:
    own = processor.feature_extractor
    frames = min(math.ceil(samples / own.hop_length), own.nb_max_frames)
    return {"num_audio_tokens": [((frames - 1) // 2 + 1 - 2) // 2 + 1]}


def _windowed_tokens(processor: Any, samples: int) -> dict[str, Any]:
    own = processor.feature_extractor
    window = int(own.sampling_rate * own.chunk_length)
    most = int(processor.max_audio_len // own.chunk_length) * window
    whole, rest = divmod(min(samples, most), window)
    frames = whole * math.ceil(window / own.hop_length) + math.ceil(rest / own.hop_length)
    return {"num_audio_tokens": [((frames - 1) // 2 + 1 - 2) // 2 + 1]}


def _granite_tokens(processor: Any, samples: int) -> dict[str, Any]:
    return {"audio_embed_sizes": processor.audio_processor._get_num_audio_features([samples])}


def _composite_tokens(processor: Any, samples: int) -> dict[str, Any]:
    return {"num_audio_tokens": [processor.sound_tokens(samples)]}


_AUDIO_STUBS: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "Qwen2AudioProcessor": _whisper_tokens,
    "Qwen2_5OmniProcessor": _whisper_tokens,
    "AudioFlamingo3Processor": _windowed_tokens,
    "GraniteSpeechProcessor": _granite_tokens,
    "CompositeProcessor": _composite_tokens,
}


def _whole_windows(processor: Any) -> int:
    own = processor.feature_extractor
    return int(processor.max_audio_len // own.chunk_length) * int(own.sampling_rate * own.chunk_length)


def _one_window(processor: Any) -> int:
    return longest_sound(processor.feature_extractor)


# Of the families that cut off the end of a longer sound without a word: samples; 0 where there is no longest.
_LONGEST: dict[str, Callable[[Any], int]] = {
    "Qwen2AudioProcessor": _one_window,
    "Qwen2_5OmniProcessor": _one_window,
    "AudioFlamingo3Processor": _whole_windows,
    "CompositeProcessor": _one_window,
}


# The parts of a processor of which one takes media of a kind.
_PARTS = {
    "image": ("image_processor",),
    "audio": ("feature_extractor", "audio_processor"),
    "behaviour": ("items",),
}


def family(processor: Any, table: dict[str, Any]) -> Any:
    """Returns the entry of the nearest class of a processor, or None."""
    for cls in type(processor).__mro__:
        if cls.__name__ in table:
            return table[cls.__name__]
    return None


def audio_samples(medium: Medium, rate_hz: int) -> int:
    """Returns how many samples an audio file has after resampling to ``rate_hz``."""
    if medium.sample_rate_hz and medium.frames:
        return math.ceil(medium.frames * rate_hz / medium.sample_rate_hz)
    return round(medium.seconds * rate_hz)


class MediaCounter:
    """Says what text stands for a medium, from its header.

    Args:
        processor: A transformers processor, or a tokenizer of a text-only model.

    Attributes:
        notes: What a person should know, each said once.
    """

    def __init__(self, processor: Any) -> None:
        self.notes: list[str] = []
        self._processor = processor
        self._trusted = True
        self._cache: OrderedDict[tuple[Any, ...], str | Refused] = OrderedDict()

    def placeholder(self, modality: str) -> str:
        """Returns the token text that the template writes in the place of a medium.

        Raises:
            Refused: The model takes no such medium.
        """
        parts = _PARTS[modality]
        token = getattr(self._processor, f"{modality}_token", None)
        if token is None or all(getattr(self._processor, part, None) is None for part in parts):
            raise Refused("modality_unsupported", f"{type(self._processor).__name__} takes no {modality}")
        return str(token)

    def expansion(self, medium: Medium, images: int) -> str:
        """Returns the text that stands for one image, video frame, sound or history.

        Args:
            medium: With the facts of its header.
            images: Number of images in its conversation (some families spend fewer tokens on
                each when there are several).

        Raises:
            Refused: The header is missing, the processor refuses such a medium, or would cut the end of a sound off.
        """
        if medium.modality == "behaviour":
            return str(self._processor.history_text(medium.frames))
        if medium.modality == "audio":
            rate = self._processor._audio_processor.sampling_rate
            key: tuple[Any, ...] = (audio_samples(medium, rate),)
            self._check_length(medium, key[0], rate)
        else:
            key = (medium.height, medium.width, images == 1)
        if min(key[:2]) <= 0:
            raise Refused("media_unprobed", f"{medium.path} has no size from its header")
        found = self._cache.get(key)
        if found is None:
            found = self._cache[key] = self._count(medium.modality, key)
            if len(self._cache) > _CACHE_SIZE:
                self._cache.popitem(last=False)
        if isinstance(found, Refused):
            raise Refused(found.reason, f"{medium.path}: {found.detail}")
        return found

    def check(self, medium: Medium, text: str) -> bool:
        """Compares a real expansion with what the header said; on a difference stubs are given up.

        Args:
            medium: A medium that stands alone in its conversation.
            text: What the real processor writes for the real file.
        """
        if not self._trusted or self.expansion(medium, 1) == text:
            return True
        self._trusted = False
        self._cache.clear()
        self._say(
            f"{type(self._processor).__name__}: the token count from the header of {medium.path} is not that of"
            " the processor; every size is counted by running the processor"
        )
        return False

    def _say(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _check_length(self, medium: Medium, samples: int, rate_hz: int) -> None:
        longest = family(self._processor, _LONGEST)
        most = longest(self._processor) if longest else 0
        if most and samples > most:
            raise Refused(
                "media_too_long",
                f"{medium.path} is {samples / rate_hz:.1f} s long; the model hears {most / rate_hz:g} s of a sound",
            )

    def _count(self, modality: str, key: tuple[Any, ...]) -> str | Refused:
        try:
            text = self._audio(key[0]) if modality == "audio" else self._image(*key)
        except (ValueError, ArithmeticError, LookupError, TypeError, RuntimeError) as error:
            return Refused(f"{modality}_refused", str(error).strip().partition("\n")[0][:200])
        return text or Refused(f"{modality}_refused", "the processor makes no token of it")

    def _image(self, height: int, width: int, alone: bool) -> str:
        build = family(self._processor, _IMAGE_STUBS) if self._trusted else None
        stub = build(self._processor, height, width, alone) if build else None
        if stub is not None:
            return str(self._processor.replace_image_token(stub, 0))
        from PIL import Image

        self._say(f"{type(self._processor).__name__}: image tokens are counted by running it on blank images")
        blank = Image.new("RGB", (width, height))
        return process_images(self._processor, [[blank] if alone else [blank, blank]])[1][0]

    def _audio(self, samples: int) -> str:
        build = family(self._processor, _AUDIO_STUBS) if self._trusted else None
        if build is not None:
            return str(self._processor.replace_audio_token(build(self._processor, samples), 0))
        self._say(f"{type(self._processor).__name__}: audio tokens are counted by running it on silence")
        return process_audio(self._processor, [np.zeros(samples, np.float32)])[1][0]


def image_arguments(processor: Any) -> dict[str, Any]:
    """Returns what the processor's own call would pass to its image part."""
    return dict(processor._merge_kwargs()["images_kwargs"])


def audio_arguments(processor: Any) -> dict[str, Any]:
    """Returns what the processor's own call would pass to its audio part."""
    rate = processor._audio_processor.sampling_rate
    return dict(processor._merge_kwargs(sampling_rate=rate)["audio_kwargs"])


def process_images(processor: Any, images: list[list[Any]]) -> tuple[dict[str, Any], list[str]]:
    """Returns the processor's image tensors and the text for every image.

    Args:
        processor: A transformers processor.
        images: One list of PIL images per conversation that has any.
    """
    data, texts = processor._process_images(images, **{**image_arguments(processor), "return_tensors": "pt"})
    return dict(data), [str(text) for text in texts]


def process_audio(processor: Any, sounds: list[np.ndarray]) -> tuple[dict[str, Any], list[str]]:
    """Returns the processor's audio tensors and the text for every sound (mono, its own rate)."""
    data, texts = processor._process_audio(sounds, **{**audio_arguments(processor), "return_tensors": "pt"})
    return dict(data), [str(text) for text in texts]
