"""The processor of a composite model: a tokenizer, and what makes pixels, sounds and histories ready for its towers.

How many tokens a medium takes follows from its header: an image always takes ``image_tokens``, a sound what the
encoder's convolutions leave of its samples, a history one for each of its newest ``history_items``.

Shapes: N histories, F items.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ProcessorMixin

import mmtune.models.log_mel  # noqa: F401  (its feature extractor becomes known to AutoFeatureExtractor)
from mmtune.models.composite.config import MODALITIES
from mmtune.models.composite.encoders import convolved
from mmtune.models.composite.template import PLAIN
from mmtune.models.composite.turns import UserTurns, user_turns_of
from mmtune.models.inputs import PADDING, history_inputs, item_ids

_PARTS = ("image_processor", "feature_extractor")


class CompositeProcessor(ProcessorMixin):
    """Text, images, sounds and histories to a composite model's inputs.

    Args:
        tokenizer: Knows ``image_token`` and ``audio_token`` as special tokens, where there are such towers.
        image_processor: Gives every image the same size; None without a vision tower.
        feature_extractor: Sounds to log-mel frames or samples; None without an audio tower.
        chat_template: Conversations to text.
        image_tokens: Tokens that every image takes.
        audio_tokens: Tokens that every sound takes, or None where that follows from its length.
        audio_convolutions: As in ``CompositeConfig``.
        items: What histories are made of, in the order of their ids; None without a behaviour tower.
        history_items: Items of a history that are read, the newest; None reads all.
        behaviour_tokens: Tokens that every history takes, or None where that follows from its length.
        frame_times: As in ``CompositeConfig``; batches then hold ``frame_milliseconds``.
        reads_prompt: As in ``CompositeConfig``; batches then hold ``prompt_mask`` and ``user_turns``.
        image_token: What stands for an image.
        audio_token: What stands for a sound.
        behaviour_token: What stands for a history.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        image_processor: Any = None,
        feature_extractor: Any = None,
        chat_template: str | None = None,
        image_tokens: int = 0,
        audio_tokens: int | None = None,
        audio_convolutions: list[list[int]] | None = None,
        frame_times: bool = False,
        reads_prompt: bool = False,
        image_token: str = "<image>",
        audio_token: str = "<audio>",
        items: Sequence[str] | None = None,
        history_items: int | None = None,
        behaviour_tokens: int | None = None,
        behaviour_token: str = "<behaviour>",
    ) -> None:
        self.image_tokens, self.audio_tokens = image_tokens, audio_tokens
        self.audio_convolutions = audio_convolutions
        self.frame_times, self.reads_prompt = frame_times, reads_prompt
        self.image_token = image_token if image_processor is not None else None
        self.audio_token = audio_token if feature_extractor is not None else None
        self.items = None if items is None else list(items)
        self.history_items, self.behaviour_tokens = history_items, behaviour_tokens
        self.behaviour_token = behaviour_token if items is not None else None
        self._item_ids = item_ids(items or ())
        for name in MODALITIES:
            token = getattr(self, f"{name}_token")
            setattr(self, f"{name}_token_id", token and tokenizer.convert_tokens_to_ids(token))
        self._turns: tuple[str, UserTurns | None] | None = None
        template = chat_template or getattr(tokenizer, "chat_template", None) or PLAIN
        super().__init__(tokenizer, image_processor, feature_extractor, chat_template=template)

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        audio: Any = None,
        histories: Sequence[Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Returns what the model takes; for one that reads the prompt with ``user_turns``, where there are any.

        Args:
            images: Of any processor.
            text: Of any processor.
            videos: Of any processor.
            audio: Of any processor.
            histories: The items of every ``behaviour_token`` in ``text``, in order, oldest first.
            kwargs: Of any processor.

        Raises:
            ValueError: There are more histories than places for them, or fewer, or the model reads none.
        """
        read = {}
        if histories:
            if self.behaviour_token is None:
                raise ValueError("histories are given, and the model reads none")
            ids, texts = self.process_histories(histories)
            text = self._with_histories(text or "", texts)
            read = {"history_ids": torch.from_numpy(ids) if kwargs.get("return_tensors") == "pt" else ids}
        elif self.behaviour_token is not None and text is not None:
            self._with_histories(text, ())
        made = super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)
        made.update(read)
        if self.user_turns is None or "input_ids" not in made:
            return made
        rows = made["input_ids"]
        one = len(rows) > 0 and np.ndim(rows[0]) == 0
        turns = [self.user_turns(own) for own in ([rows] if one else rows)]
        if "attention_mask" in made:
            masks = [made["attention_mask"]] if one else made["attention_mask"]
            turns = [own * np.asarray(mask) for own, mask in zip(turns, masks, strict=True)]
        # A text that no template made is all prompt.
        if any(own.any() for own in turns):
            shown: Any = turns[0].tolist() if one else [own.tolist() for own in turns]
            if not isinstance(rows, list):
                shown = torch.tensor(shown) if torch.is_tensor(rows) else np.array(shown)
            made["user_turns"] = shown
        return made

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns a conversation as text or, with ``tokenize=True``, as what the model takes.

        Args:
            conversation: Of any processor; a part ``{"type": "behaviour", "behaviour": ["318", "50"]}`` is a history.
                One that holds no items takes the next of ``histories`` in ``processor_kwargs``.
            args: Of any processor.
            kwargs: Of any processor.

        Raises:
            ValueError: Histories stand in the parts and in ``processor_kwargs``, or are not as many as their places.
        """
        own = self._histories_in(conversation) if kwargs.get("tokenize") else []
        if own:
            given = dict(kwargs.get("processor_kwargs") or {})
            if given.get("histories") or kwargs.get("histories"):
                raise ValueError("histories stand in the parts of the messages and in processor_kwargs; give them once")
            kwargs["processor_kwargs"] = {**given, "histories": own}
        return super().apply_chat_template(conversation, *args, **kwargs)

    def _histories_in(self, conversation: Any) -> list[Any]:
        """Returns the items of every part that holds some, in order, over all conversations."""
        talks, _ = self._normalize_conversations(conversation)
        contents = (turn.get("content") for talk in talks for turn in talk)
        parts = (part for content in contents if isinstance(content, list | tuple) for part in content)
        found = (
            part.get("behaviour") for part in parts if isinstance(part, Mapping) and part.get("type") == "behaviour"
        )
        return [items for items in found if items is not None]

    @property
    def user_turns(self) -> UserTurns | None:
        """Where the words of the user stand in ids, for a model that reads the prompt; None where that is not told."""
        if not self.reads_prompt:
            return None
        key = str(self.chat_template)
        if self._turns is None or self._turns[0] != key:
            self._turns = key, user_turns_of(self.tokenizer, key)
        return self._turns[1]

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Returns the class a part must have; a part that the model does without is none."""
        if argument is None and argument_name in _PARTS:
            return None
        return super().check_argument_for_proper_class(argument_name, argument)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Returns the text that stands for one image."""
        return str(self.image_token) * self.image_tokens

    def replace_audio_token(self, audio_inputs: dict[str, Any], audio_idx: int, **kwargs: Any) -> str:
        """Returns the text that stands for one sound of ``num_audio_tokens``."""
        return str(self.audio_token) * int(audio_inputs["num_audio_tokens"][audio_idx])

    def sound_tokens(self, samples: int) -> int:
        """Returns how many tokens a sound of so many samples takes, at the extractor's rate."""
        return self._tokens_of(frame_count(self.feature_extractor, samples))

    def newest(self, items: Sequence[str]) -> Sequence[str]:
        """Returns the items of a history that are read."""
        return items[-self.history_items :] if self.history_items else items

    def knows(self, item: str) -> bool:
        """Says whether an item has an id of its own."""
        return item in self._item_ids

    def history_text(self, items: int) -> str:
        """Returns the text that stands for a history of so many items."""
        if self.behaviour_tokens is not None:
            return str(self.behaviour_token) * self.behaviour_tokens
        # One without any item is told as such.
        return str(self.behaviour_token) * max(min(items, self.history_items or items), 1)

    def process_histories(self, histories: Sequence[Sequence[str]]) -> tuple[np.ndarray, list[str]]:
        """Returns ``history_ids`` ``(N, F)``, 0 behind the last item, and the text that stands for every history.

        Raises:
            ValueError: A history is no list of strings.
        """
        for own in histories:
            if isinstance(own, str) or not all(isinstance(item, str) for item in own):
                raise ValueError(f"a history is a list of items, each a string, not {own!r}")
        newest = [self.newest(own) for own in histories]
        found = [history_inputs(self._item_ids, own)["input_ids"][0] for own in newest]
        ids = np.full((len(found), max(map(len, found))), PADDING, dtype=np.int64)
        for row, own in zip(ids, found, strict=True):
            row[: len(own)] = own
        return ids, [self.history_text(len(own)) for own in newest]

    def _with_histories(self, text: Any, shown: Sequence[str]) -> Any:
        """Returns the texts in which every place of a history is as long as it is."""
        rows = [text] if isinstance(text, str) else list(text)
        places = sum(row.count(str(self.behaviour_token)) for row in rows)
        if places != len(shown):
            raise ValueError(
                f"the text has {self.behaviour_token} {places} times, and {len(shown)} histories are given for them"
            )
        left = iter(shown)
        rows = [re.sub(re.escape(str(self.behaviour_token)), lambda _: next(left), row) for row in rows]
        return rows[0] if isinstance(text, str) else rows

    def _tokens_of(self, frames: int) -> int:
        if self.audio_tokens is not None:
            return self.audio_tokens
        return convolved(frames, self.audio_convolutions or [])

    def _process_audio(self, audio: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        # Whisper's encoder takes pictures of one length only.
        padding = "max_length" if hasattr(self.feature_extractor, "nb_max_frames") else True
        asked = {**kwargs, "return_attention_mask": True, "padding": padding}
        made = dict(self.feature_extractor(audio, **asked))
        mask = made.pop("attention_mask", None)
        inputs = made.pop("input_features") if "input_features" in made else made.pop("input_values")
        made = {"input_features": inputs}
        if mask is not None:
            made["feature_attention_mask"] = mask
        frames = [0] * len(audio) if mask is None else [int(own.sum()) for own in mask]
        made["num_audio_tokens"] = [self._tokens_of(own) for own in frames]
        return made, [self.replace_audio_token(made, index) for index in range(len(audio))]

    @property
    def unused_input_names(self) -> list[str]:
        """Names that the model does not take."""
        return ["num_audio_tokens"]

    @property
    def model_input_names(self) -> list[str]:
        """Names that the model takes."""
        images = list(self.image_processor.model_input_names) if self.image_processor is not None else []
        sounds = ["input_features", "feature_attention_mask"] if self.feature_extractor is not None else []
        histories = ["history_ids"] if self.items is not None else []
        return [*self.tokenizer.model_input_names, *images, *sounds, *histories]

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Writes the tokenizer, the chat template and ``processor_config.json``; returns the path of the last."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(str(self.chat_template), encoding="utf-8")
        self.to_json_file(folder / "processor_config.json")
        return [str(folder / "processor_config.json")]

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

        kinds: dict[str, Any] = {"image_processor": AutoImageProcessor, "feature_extractor": AutoFeatureExtractor}
        parts = [
            kinds[name].from_pretrained(pretrained_model_name_or_path, **kwargs)
            if (processor_dict or {}).get(name)
            else None
            for name in _PARTS
        ]
        return [AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs), *parts]


def frame_count(extractor: Any, samples: int) -> int:
    """Returns how many frames (or samples) a feature extractor makes of so many samples."""
    hop = getattr(extractor, "hop_length", None)
    if hop is None:
        return samples
    if hasattr(extractor, "nb_max_frames"):
        return min(-(-samples // hop), int(extractor.nb_max_frames))
    return max(samples, int(extractor.n_fft)) // int(hop)
