"""Rows and their media to one padded batch of tensors, as the family's model takes it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtune.encoding.media_tokens import family, process_audio, process_images
from mmtune.encoding.processor import pad_token_id
from mmtune.encoding.render import IGNORED, EncodedRow, MediaSpan
from mmtune.errors import IntegrityError
from mmtune.features.shards import Features, Item, joined_features

# Families whose image tensors are simply joined along the first dimension, one image after the
# other; a processed image can then be kept and used again.
_JOINED = dict.fromkeys(
    (
        "LlavaProcessor",
        "Qwen2VLProcessor",
        "Qwen2_5_VLProcessor",
        "Qwen3VLProcessor",
        "Qwen2_5OmniProcessor",
        "InternVLProcessor",
        "Gemma3Processor",
    ),
    True,
)


class Collator:
    """Pads rows and processes their media; each distinct medium is decoded once per batch.

    Args:
        processor: The family's processor, or a tokenizer.
        media_root: Folder that media paths are relative to.
        left: Pad on the left, for generation.
        cache_bytes: Most bytes of processed images kept between batches.
        augment: ``(image, its name, step)`` to the image that is shown at a training step.
    """

    def __init__(
        self,
        processor: Any,
        *,
        media_root: Path,
        left: bool = False,
        cache_bytes: int = 512 << 20,
        augment: Callable[[Any, str, int], Any] | None = None,
    ) -> None:
        self._processor, self.media_root, self._left = processor, media_root, left
        self._augment = augment
        self._pad = pad_token_id(processor)
        self._joined = bool(family(processor, _JOINED))
        self._per_row = bool(family(processor, {"Idefics3Processor": True, "SmolVLMProcessor": True}))
        self._gemma = bool(family(processor, {"Gemma3Processor": True}))
        self._cache: OrderedDict[Any, dict[str, torch.Tensor]] = OrderedDict()
        self._room = cache_bytes
        self._features: Mapping[str, Features] = {}
        self._types = getattr(processor, "return_mm_token_type_ids", False) or self._gemma

    def with_features(self, kind: str, features: Features) -> Collator:
        """Returns a collator that takes features in place of every ``image`` (with video frames) or ``audio``."""
        other = copy(self)
        other._features = {**self._features, kind: features}
        return other

    def __call__(self, rows: Sequence[EncodedRow], step: int | None = None) -> dict[str, torch.Tensor]:
        """Returns ``input_ids``, ``attention_mask``, ``labels`` of shape ``(B, T)`` and the media tensors.

        Args:
            rows: The rows.
            step: Training step, for images that change while training; None shows them as they are.

        Raises:
            IntegrityError: A medium now takes another number of tokens than at tokenize time.
        """
        return {**self.text(rows), **self.media(rows, step)}

    def text(self, rows: Sequence[EncodedRow], multiple_of: int = 1) -> dict[str, torch.Tensor]:
        """Returns ``input_ids``, ``attention_mask``, ``labels`` and the family's token types, all ``(B, T)``.

        Args:
            rows: The rows.
            multiple_of: T is rounded up to a multiple of this.
        """
        longest = -(-max(row.input_ids.size for row in rows) // multiple_of) * multiple_of
        shape = (len(rows), longest)
        ids = np.full(shape, self._pad, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        for index, row in enumerate(rows):
            size = row.input_ids.size
            place = slice(longest - size, longest) if self._left else slice(0, size)
            ids[index, place], labels[index, place], mask[index, place] = row.input_ids, row.labels, 1
        batch = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels),
        }
        return {**batch, **self._token_types(batch)}

    def token_id(self, kind: str) -> int | None:
        """Returns the id that stands for a piece of an ``image`` or ``audio``; None where the family takes none."""
        found: int | None = getattr(self._processor, f"{kind}_token_id", None)
        return found

    def rows_per_token(self, kind: str) -> int:
        """Returns the features that one recorded token stands for: Gemma 3 records the token that opens an image."""
        return int(self._processor.image_seq_length) if self._gemma and kind == "image" else 1

    @property
    def media_by_row(self) -> bool:
        """Whether the family lays its images out by row of the batch, not one after the other."""
        return self._per_row

    def media(self, rows: Sequence[EncodedRow], step: int | None = None) -> dict[str, torch.Tensor]:
        """Returns the media tensors of some conversations, in order; ``step`` as in ``__call__``.

        Raises:
            IntegrityError: A medium now takes another number of tokens than at tokenize time.
        """
        return {**self._images(rows, step if self._augment else None), **self._audios(rows)}

    def _token_types(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self._types:
            return {}
        types = torch.tensor(self._processor.create_mm_token_type_ids(batch["input_ids"].tolist()))
        return {"token_type_ids" if self._gemma else "mm_token_type_ids": types * batch["attention_mask"]}

    def _images(self, rows: Sequence[EncodedRow], step: int | None) -> dict[str, torch.Tensor]:
        per_row = [[span for span in row.media if span.medium.modality != "audio"] for row in rows]
        if not any(per_row):
            return {}
        if "image" in self._features:
            spans = [(row, span) for row, own in zip(rows, per_row, strict=True) for span in own]
            return self._from_features("image", spans)
        if self._joined:
            shown: dict[Any, dict[str, torch.Tensor]] = {}
            for row, span in ((row, span) for row, spans in zip(rows, per_row, strict=True) for span in spans):
                if _key(span) not in shown:
                    shown[_key(span)] = self._one_image(row, span, step)
            parts = [shown[_key(span)] for spans in per_row for span in spans]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        pictures: dict[Any, Any] = {}
        for span in (span for spans in per_row for span in spans):
            if _key(span) not in pictures:
                pictures[_key(span)] = self._picture(span, step)
        # Idefics3 and SmolVLM make one padded row of images per conversation, empty ones included.
        nested = [[pictures[_key(span)] for span in spans] for spans in per_row if spans or self._per_row]
        made, texts = process_images(self._processor, nested)
        self._check([(row, span) for row, spans in zip(rows, per_row, strict=True) for span in spans], texts)
        return self._kept(made)

    def _from_features(self, kind: str, spans: Sequence[tuple[EncodedRow, MediaSpan]]) -> dict[str, torch.Tensor]:
        found = []
        for row, span in spans:
            item = Item(span.medium, span.frame, span.frames)
            self._compare(row, span, self._features[kind].tokens(item))
            found.append(self._features[kind][item])
        joined = joined_features(found)
        frames = joined.pop("audio_frames", None)
        if frames is not None:
            joined["feature_attention_mask"] = (torch.arange(int(frames.max())) < frames[:, None]).long()
        return joined

    def processed(self, items: Sequence[Item]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Returns the tensors of images or of sounds, each as in a conversation of its own, and the tokens of each."""
        spans = [MediaSpan(item.medium, 0, 0, item.frame, item.frames) for item in items]
        if items[0].medium.modality == "audio":
            made, texts = process_audio(self._processor, [self._sound(span) for span in spans])
            return self._kept(made), [text.count(self._processor.audio_token) for text in texts]
        made, texts = process_images(self._processor, [[self._picture(span, None)] for span in spans])
        return self._kept(made), [text.count(self._processor.image_token) for text in texts]

    def _one_image(self, row: EncodedRow, span: MediaSpan, step: int | None) -> dict[str, torch.Tensor]:
        key = _key(span)
        if step is None and key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        made, texts = process_images(self._processor, [[self._picture(span, step)]])
        self._check([(row, span)], texts)
        kept = self._kept(made)
        if step is not None:
            return kept
        self._cache[key] = kept
        self._room -= _bytes(kept)
        while self._room < 0 and self._cache:
            self._room += _bytes(self._cache.popitem(last=False)[1])
        return kept

    def _picture(self, span: MediaSpan, step: int | None) -> Any:
        from mmtune.media.load import load_image, load_video_frames

        if span.medium.modality == "video":
            picture = load_video_frames(self.media_root, span.medium, span.frames)[span.frame]
        else:
            picture = load_image(self.media_root, span.medium)
        if step is None or self._augment is None:
            return picture
        # All frames of a video move together.
        return self._augment(picture, span.medium.path or span.medium.sha256, step)

    def _audios(self, rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
        spans = [(row, span) for row in rows for span in row.media if span.medium.modality == "audio"]
        if not spans:
            return {}
        if "audio" in self._features:
            return self._from_features("audio", spans)
        sounds: dict[Any, np.ndarray] = {}
        for _, span in spans:
            if _key(span) not in sounds:
                sounds[_key(span)] = self._sound(span)
        made, texts = process_audio(self._processor, [sounds[_key(span)] for _, span in spans])
        self._check(spans, texts)
        return self._kept(made)

    def _sound(self, span: MediaSpan) -> np.ndarray:
        from mmtune.media.load import load_audio

        return load_audio(self.media_root, span.medium, self._processor._audio_processor.sampling_rate)

    def _kept(self, made: Any) -> dict[str, torch.Tensor]:
        unused = set(getattr(self._processor, "unused_input_names", ())) | {"rows", "cols", "num_patches"}
        return {name: torch.as_tensor(value) for name, value in made.items() if name not in unused}

    def _expected(self, row: EncodedRow, span: MediaSpan) -> int:
        token = "audio_token_id" if span.medium.modality == "audio" else "image_token_id"
        inside = row.input_ids[span.start : span.start + span.length]
        return int((inside == getattr(self._processor, token)).sum())

    def _check(self, spans: Sequence[tuple[EncodedRow, MediaSpan]], texts: Sequence[str]) -> None:
        """Compares the media tokens of the real expansion with those recorded in the row."""
        for (row, span), text in zip(spans, texts, strict=True):
            modality = "audio" if span.medium.modality == "audio" else "image"
            self._compare(row, span, text.count(getattr(self._processor, f"{modality}_token")))

    def _compare(self, row: EncodedRow, span: MediaSpan, found: int) -> None:
        expected = self._expected(row, span)
        if found != expected:
            raise IntegrityError(
                f"{span.medium.path} takes {found} tokens now, tokens/ holds {expected}",
                "the file changed since build-data; run: mmtune build-data --force, then mmtune tokenize",
                "media_changed",
            )


def _key(span: MediaSpan) -> Any:
    return (span.medium.path, span.medium.data, span.frame, span.frames)


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
