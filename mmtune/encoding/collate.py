"""Rows and their media to one padded batch of tensors, as the family's model takes it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtune.encoding.cache import Cache
from mmtune.encoding.media_tokens import family, process_audio, process_images
from mmtune.encoding.processor import pad_token_id
from mmtune.encoding.render import IGNORED, EncodedRow, MediaSpan
from mmtune.errors import IntegrityError
from mmtune.features.shards import Features, Item, joined_features
from mmtune.media.video import frame_places
from mmtune.records import READ_BY, items_of

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
        "CompositeProcessor",
    ),
    True,
)


class Collator:
    """Pads rows and processes their media; each distinct medium is decoded once per batch.

    Args:
        processor: The family's processor, or a tokenizer.
        media_root: Folder that media paths are relative to.
        left: Pad on the left, for generation.
        cache_bytes: Most bytes of processed or decoded media kept between batches.
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
        self._cache = Cache(cache_bytes)
        self._features: Mapping[str, Features] = {}
        self._pixels: Features | None = None
        self._missing: frozenset[str] = frozenset()
        self._types = getattr(processor, "return_mm_token_type_ids", False) or self._gemma

    def with_features(self, kind: str, features: Features) -> Collator:
        """Returns a collator that takes features in place of every ``image`` (with video frames) or ``audio``."""
        other = copy(self)
        other._features = {**self._features, kind: features}
        return other

    def without(self, modalities: Collection[str]) -> Collator:
        """Returns a collator that hides the tokens of some modalities; all others keep their positions."""
        other = copy(self)
        other._missing = frozenset(modalities)
        return other

    def with_pixels(self, pixels: Features) -> Collator:
        """Returns a collator that takes processed images from disk where they stand there."""
        other = copy(self)
        other._pixels = pixels
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
        return self._hidden(rows, {**batch, **self._token_types(batch), **self._prompt(batch)})

    def _hidden(self, rows: Sequence[EncodedRow], batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the batch with a mask under which nobody sees the tokens of missing modalities."""
        if not self._missing:
            return batch
        mask = batch["attention_mask"]
        seen = mask.clone()
        for index, row in enumerate(rows):
            first = mask.shape[1] - row.input_ids.size if self._left else 0
            for span in row.media:
                if span.medium.modality in self._missing:
                    seen[index, first + span.start : first + span.start + span.length] = 0
        return {**batch, "attention_mask": seen, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    def _prompt(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns where the first answer has not begun and users speak, for a family that reads the prompt so."""
        if not self.reads_prompt:
            return {}
        mask = batch["attention_mask"]
        made = {"prompt_mask": ((batch["labels"] != IGNORED).cumsum(1) == 0).long() * mask}
        if self.user_turns is not None:
            turns = np.stack([self.user_turns(own) for own in batch["input_ids"].numpy()])
            made["user_turns"] = torch.from_numpy(turns) * mask
        return made

    def token_id(self, kind: str) -> int | None:
        """Returns the id that stands for a piece of a medium of a kind; None where the family takes none."""
        found: int | None = getattr(self._processor, f"{kind}_token_id", None)
        return found

    def rows_per_token(self, kind: str) -> int:
        """Returns the features that one recorded token stands for: Gemma 3 records the token that opens an image."""
        return int(self._processor.image_seq_length) if self._gemma and kind == "image" else 1

    @property
    def reads_prompt(self) -> bool:
        """Whether the family reads a prompt in both directions, so that its beginning depends on its end."""
        return bool(getattr(self._processor, "reads_prompt", False))

    @property
    def user_turns(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """Ids ``(T,)`` of a conversation to the turns of its users ``(T,)``, where the family is told of them."""
        found: Callable[[np.ndarray], np.ndarray] | None = getattr(self._processor, "user_turns", None)
        return found

    @property
    def media_by_row(self) -> bool:
        """Whether the family lays its images out by row of the batch, not one after the other."""
        return self._per_row

    @property
    def joins_images(self) -> bool:
        """Whether an image's tensors are the same whatever stands beside it in the batch."""
        return self._joined

    def media(self, rows: Sequence[EncodedRow], step: int | None = None) -> dict[str, torch.Tensor]:
        """Returns the media tensors of some conversations, in order; ``step`` as in ``__call__``.

        Raises:
            IntegrityError: A medium now takes another number of tokens than at tokenize time.
        """
        return {**self._images(rows, step if self._augment else None), **self._audios(rows), **self._histories(rows)}

    def _token_types(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self._types:
            return {}
        types = torch.tensor(self._processor.create_mm_token_type_ids(batch["input_ids"].tolist()))
        return {"token_type_ids" if self._gemma else "mm_token_type_ids": types * batch["attention_mask"]}

    def _images(self, rows: Sequence[EncodedRow], step: int | None) -> dict[str, torch.Tensor]:
        per_row = [[span for span in row.media if READ_BY[span.medium.modality] == "image"] for row in rows]
        if not any(per_row):
            return {}
        spans = [(row, span) for row, own in zip(rows, per_row, strict=True) for span in own]
        if "image" in self._features:
            return self._from_features("image", spans)
        distinct: dict[Any, tuple[EncodedRow, MediaSpan]] = {}
        for row, span in spans:
            distinct.setdefault(_key(span), (row, span))
        if self._joined:
            shown = self._each(distinct, step)
            parts = [shown[_key(span)] for _, span in spans]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        pictures = dict(zip(distinct, self._pictures([span for _, span in distinct.values()], step), strict=True))
        # Idefics3 and SmolVLM make one padded row of images per conversation, empty ones included.
        nested = [[pictures[_key(span)] for span in own] for own in per_row if own or self._per_row]
        made, texts = process_images(self._processor, nested)
        self._check(spans, texts)
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
        spans = _spans(items)
        if items[0].medium.modality == "audio":
            made, texts = process_audio(self._processor, [self._sound(span) for span in spans])
            return self._kept(made), [text.count(self._processor.audio_token) for text in texts]
        made, texts = process_images(self._processor, [[picture] for picture in self._pictures(spans, None)])
        return {**self._kept(made), **self._times(spans)}, [text.count(self._processor.image_token) for text in texts]

    def processed_apart(self, items: Sequence[Item]) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
        """Yields the tensors of each image alone, and the tokens it takes."""
        for picture in self._pictures(_spans(items), None):
            made, texts = process_images(self._processor, [[picture]])
            yield self._kept(made), texts[0].count(self._processor.image_token)

    def _each(
        self, distinct: Mapping[Any, tuple[EncodedRow, MediaSpan]], step: int | None
    ) -> dict[Any, dict[str, torch.Tensor]]:
        """Returns the tensors of every image: from memory, from disk, or decoded and processed."""
        shown, missing = {}, {}
        for key, (row, span) in distinct.items():
            known = self._known(row, span) if step is None else None
            if known is None:
                missing[key] = row, span
            else:
                shown[key] = known
        pictures = self._pictures([span for _, span in missing.values()], step)
        for (key, (row, span)), picture in zip(missing.items(), pictures, strict=True):
            made, texts = process_images(self._processor, [[picture]])
            self._check([(row, span)], texts)
            shown[key] = {**self._kept(made), **self._times([span])}
            if step is None:
                self._cache.put(key, shown[key], _bytes(shown[key]))
        return shown

    def _known(self, row: EncodedRow, span: MediaSpan) -> dict[str, torch.Tensor] | None:
        found: dict[str, torch.Tensor] | None = self._cache.get(_key(span))
        if found is None and self._pixels is not None:
            item = Item(span.medium, span.frame, span.frames)
            if item in self._pixels:
                self._compare(row, span, self._pixels.tokens(item))
                found = {**self._pixels[item], **self._times([span])}
                self._cache.put(_key(span), found, _bytes(found))
        return found

    def _times(self, spans: Sequence[MediaSpan]) -> dict[str, torch.Tensor]:
        """Returns when the frames of videos were taken, -1 for other images, for a family that is told."""
        if not getattr(self._processor, "frame_times", False):
            return {}
        return {"frame_milliseconds": torch.tensor([_milliseconds(span) for span in spans])}

    def _pictures(self, spans: Sequence[MediaSpan], step: int | None) -> Iterator[Any]:
        """Yields the picture of every span; a video is decoded once for its frames, which follow each other."""
        from mmtune.media.load import load_image, load_video_frames

        frames: list[Any] = []
        of: Any = None
        for span in spans:
            key = ("picture", *_key(span))
            picture = self._cache.get(key)
            if picture is None and span.medium.modality == "video":
                if of != _file(span):
                    of, frames = _file(span), load_video_frames(self.media_root, span.medium, span.frames)
                picture = frames[span.frame]
            elif picture is None:
                picture = load_image(self.media_root, span.medium)
            if step is not None or not self._joined:
                # Elsewhere it is the processed image that is kept.
                self._cache.put(key, picture, 3 * picture.width * picture.height)
            if step is not None and self._augment is not None:
                # All frames of a video move together.
                picture = self._augment(picture, span.medium.path or span.medium.sha256, step)
            yield picture

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

    def _histories(self, rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
        spans = [(row, span) for row in rows for span in row.media if span.medium.modality == "behaviour"]
        if not spans:
            return {}
        made, texts = self._processor.process_histories([items_of(span.medium) for _, span in spans])
        self._check(spans, texts)
        return {"history_ids": torch.from_numpy(made)}

    def _sound(self, span: MediaSpan) -> np.ndarray:
        from mmtune.media.load import load_audio

        sound: np.ndarray | None = self._cache.get(_key(span))
        if sound is None:
            sound = load_audio(self.media_root, span.medium, self._processor._audio_processor.sampling_rate)
        # Kept as it is at the model's rate: reading and resampling take most of the time.
        self._cache.put(_key(span), sound, sound.nbytes)
        return sound

    def _kept(self, made: Any) -> dict[str, torch.Tensor]:
        unused = set(getattr(self._processor, "unused_input_names", ())) | {"rows", "cols", "num_patches"}
        return {name: torch.as_tensor(value) for name, value in made.items() if name not in unused}

    def _expected(self, row: EncodedRow, span: MediaSpan) -> int:
        token = f"{READ_BY[span.medium.modality]}_token_id"
        inside = row.input_ids[span.start : span.start + span.length]
        return int((inside == getattr(self._processor, token)).sum())

    def _check(self, spans: Sequence[tuple[EncodedRow, MediaSpan]], texts: Sequence[str]) -> None:
        """Compares the media tokens of the real expansion with those recorded in the row."""
        for (row, span), text in zip(spans, texts, strict=True):
            token = getattr(self._processor, f"{READ_BY[span.medium.modality]}_token")
            self._compare(row, span, text.count(token))

    def _compare(self, row: EncodedRow, span: MediaSpan, found: int) -> None:
        expected = self._expected(row, span)
        if found != expected:
            raise IntegrityError(
                f"{span.medium.path or span.medium.modality} takes {found} tokens now, tokens/ holds {expected}",
                "the file changed since build-data; run: mmtune build-data --force, then mmtune tokenize",
                "media_changed",
            )


def _milliseconds(span: MediaSpan) -> int:
    video = span.medium
    if video.modality != "video":
        return -1
    place = frame_places(video.frames, span.frames)[span.frame]
    return round(1000 * video.seconds * place / max(video.frames, 1))


def _key(span: MediaSpan) -> Any:
    return (span.medium.modality, span.medium.path, span.medium.data, span.frame, span.frames)


def _file(span: MediaSpan) -> Any:
    return (span.medium.path, span.medium.data, span.frames)


def _spans(items: Sequence[Item]) -> list[MediaSpan]:
    return [MediaSpan(item.medium, 0, 0, item.frame, item.frames) for item in items]


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
