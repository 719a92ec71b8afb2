"""A batch equals what the processor's own call makes of the same conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmtune.encoding.cache import Cache
from mmtune.encoding.collate import Collator
from mmtune.errors import IntegrityError
from mmtune.media.augment import Augmentation
from mmtune.records import Medium, Message, TextPart

# Sizes of the images of each conversation; one has none, one has two.
BATCHES = {
    "mixed": [[(60, 40)], [], [(33, 90), (28, 28)]],
    "same": [[(50, 50)], [(50, 50)]],
    "none": [[], []],
    "first empty": [[], [(40, 40)]],
}


@pytest.fixture
def served(monkeypatch: Any) -> dict[str, Any]:
    """Media by path, served in the place of files."""
    store: dict[str, Any] = {}
    import mmtune.media.load as load

    monkeypatch.setattr(load, "load_image", lambda root, medium: store[medium.path])
    monkeypatch.setattr(load, "load_audio", lambda root, medium, rate: store[medium.path])
    return store


def batch_of(family: Any, media: Any, served: dict[str, Any], sizes: Any, sound: bool) -> Any:
    rows, plain = [], []
    for number, entry in enumerate(sizes):
        made = [media.audio(8_000 + 900 * w) if sound else media.image(w, h) for w, h in entry]
        for medium, real in made:
            served[medium.path] = real["audio" if sound else "image"]
        text = "What is it? " * (number + 1)
        messages = [
            Message("user", (*(medium for medium, _ in made), TextPart(text))),
            Message("assistant", (TextPart("a cat"),)),
        ]
        rows.append(family.renderer.encode(messages))
        shown = [*(real for _, real in made), {"type": "text", "text": text}]
        plain.append(
            [
                {"role": "user", "content": shown},
                {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
            ]
        )
    return rows, plain


def reference(family: Any, plain: Any, side: str) -> dict[str, torch.Tensor]:
    from transformers import ProcessorMixin

    tokenizer = family.processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    write = (
        ProcessorMixin.apply_chat_template if family.name == "smolvlm" else type(family.processor).apply_chat_template
    )
    options = {"text_kwargs": {"padding": True, "padding_side": side}}
    made = write(
        family.processor, plain, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options
    )
    return dict(made)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, Any]) -> None:
    # No call of a processor can know where the prompt ends, and when a frame was taken.
    assert set(found) - {"labels", "prompt_mask", "frame_milliseconds"} == set(expected)
    for name, value in expected.items():
        value = torch.as_tensor(np.asarray(value)) if not isinstance(value, torch.Tensor) else value
        assert found[name].shape == value.shape, name
        assert torch.equal(found[name].to(value.dtype), value), name


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch", list(BATCHES))
def test_image_batches(image_family: Any, media: Any, served: Any, batch: str, side: str) -> None:
    rows, plain = batch_of(image_family, media, served, BATCHES[batch], sound=False)
    found = Collator(image_family.processor, media_root=Path(), left=side == "left")(rows)
    assert_same(found, reference(image_family, plain, side))
    assert ((found["labels"] != -100) <= (found["attention_mask"] == 1)).all()


@pytest.mark.parametrize("batch", list(BATCHES))
def test_audio_batches(audio_family: Any, media: Any, served: Any, batch: str) -> None:
    if audio_family.name == "audio_flamingo3" and batch in ("mixed", "first empty"):
        pytest.skip("its own call wants one sound in every conversation")
    rows, plain = batch_of(audio_family, media, served, BATCHES[batch], sound=True)
    found = Collator(audio_family.processor, media_root=Path())(rows)
    assert_same(found, reference(audio_family, plain, "right"))


def test_a_changed_file_is_noticed(family_of: Any, media: Any, served: Any) -> None:
    for name in ("qwen2_vl", "idefics3", "llava_onevision", "internvl"):
        family = family_of(name)
        rows, _ = batch_of(family, media, served, [[(60, 40)]], sound=False)
        served["60x40.png"] = media.image(200, 190)[1]["image"]
        with pytest.raises(IntegrityError, match=r"60x40\.png"):
            Collator(family.processor, media_root=Path())(rows)


def test_each_file_is_opened_once_per_batch(family_of: Any, media: Any, served: Any, monkeypatch: Any) -> None:
    import mmtune.media.load as load

    opened = []
    monkeypatch.setattr(load, "load_image", lambda root, medium: opened.append(medium.path) or served[medium.path])
    for name in ("qwen2_vl", "idefics3"):
        opened.clear()
        rows, _ = batch_of(family_of(name), media, served, [[(60, 40)]] * 3 + [[(28, 28)]], sound=False)
        Collator(family_of(name).processor, media_root=Path())(rows)
        assert sorted(opened) == ["28x28.png", "60x40.png"]


@pytest.mark.parametrize("name", ["qwen2_vl", "idefics3"])
def test_images_change_by_step_and_only_while_training(family_of: Any, media: Any, served: Any, name: str) -> None:
    family = family_of(name)
    rows, _ = batch_of(family, media, served, [[(60, 40)], [(60, 40), (28, 28)]], sound=False)
    plain = Collator(family.processor, media_root=Path())(rows)
    collate = Collator(family.processor, media_root=Path(), augment=Augmentation(0, 0.2, ("horizontal",)))
    assert_same(collate(rows), {name: value for name, value in plain.items() if name != "labels"})
    third = collate(rows, 3)
    assert torch.equal(third["input_ids"], plain["input_ids"])
    assert not torch.equal(third["pixel_values"], plain["pixel_values"])
    assert not torch.equal(third["pixel_values"], collate(rows, 4)["pixel_values"])
    # The first row alone shows its image as it was among others.
    again = collate(rows[:1], 3)["pixel_values"]
    assert torch.equal(again.flatten(), third["pixel_values"].flatten()[: again.numel()])
    assert_same(collate(rows), {name: value for name, value in plain.items() if name != "labels"})


def video_rows(family: Any, names: list[str]) -> list[Any]:
    clips = {name: Medium("video", name, width=60, height=40, frames=30, fps=10, seconds=3) for name in names}
    asked = (Message("user", (clips[name], TextPart("What?"))) for name in names)
    return [family.renderer.encode([one, Message("assistant", (TextPart("a cat"),))]) for one in asked]


@pytest.fixture
def opened(monkeypatch: Any) -> list[str]:
    """The videos and sounds that were decoded, in order."""
    import mmtune.media.load as load

    found: list[str] = []

    def frames(root: Any, medium: Any, count: int) -> list[Any]:
        found.append(medium.path)
        noise = np.random.default_rng(len(medium.path)).integers(0, 255, (count, 40, 60, 3), dtype=np.uint8)
        return [Image.fromarray(one) for one in noise]

    def sound(root: Any, medium: Any, rate: int) -> np.ndarray:
        found.append(medium.path)
        return np.random.default_rng(medium.frames).standard_normal(medium.frames).astype(np.float32)

    monkeypatch.setattr(load, "load_video_frames", frames)
    monkeypatch.setattr(load, "load_audio", sound)
    return found


@pytest.mark.parametrize("augment", [None, Augmentation(0, 0.2, ("horizontal",))], ids=["plain", "augment"])
@pytest.mark.parametrize("name", ["qwen2_vl", "idefics3", "llava_onevision"])
def test_a_video_is_decoded_once_while_it_fits(family_of: Any, opened: list[str], name: str, augment: Any) -> None:
    family = family_of(name)
    rows = video_rows(family, ["a.mp4", "bb.mp4", "a.mp4"])
    assert len(rows[0].media) == 8
    for room, decodes in ((0, 2), (1 << 24, 1)):
        opened.clear()
        collate = Collator(family.processor, media_root=Path(), cache_bytes=room, augment=augment)
        first = collate(rows, 1)
        assert opened == ["a.mp4", "bb.mp4"]
        assert_same(collate(rows, 1), {key: value for key, value in first.items() if key != "labels"})
        assert len(opened) == 2 * decodes


def test_a_sound_is_decoded_and_resampled_once_while_it_fits(
    family_of: Any, media: Any, served: Any, opened: list[str]
) -> None:
    family = family_of("qwen2_audio")
    rows, _ = batch_of(family, media, served, [[(2, 2)], [(2, 2), (3, 3)]], sound=True)
    for room, decodes in ((0, 2), (1 << 24, 1)):
        opened.clear()
        collate = Collator(family.processor, media_root=Path(), cache_bytes=room)
        first = collate(rows)
        assert len(opened) == 2
        assert_same(collate(rows), {key: value for key, value in first.items() if key != "labels"})
        assert len(opened) == 2 * decodes


def test_what_is_kept_never_takes_more_than_its_room() -> None:
    kept = Cache(10)
    for key, size in (("a", 4), ("b", 4), ("a", 5), ("huge", 11)):
        kept.put(key, key + "!", size)
    assert (kept.get("a"), kept.get("b"), kept.get("huge")) == ("a!", "b!", None)
    assert kept.get("a") == "a!"
    kept.put("c", "c!", 3)
    assert (kept.get("a"), kept.get("b"), kept.get("c")) == ("a!", None, "c!")
    kept.put("a", "new", 10)
    assert (kept.get("a"), kept.get("c")) == ("new", None)


@pytest.mark.parametrize("left", [False, True])
def test_missing_modalities_are_hidden_and_all_keep_their_places(
    family_of: Any, media: Any, served: Any, left: bool
) -> None:
    family = family_of("composite")
    made = [media.image(60, 40), media.audio(9_000)]
    for medium, real in made:
        served[medium.path] = real[medium.modality]
    asked = (Message("user", (*(medium for medium, _ in made), TextPart("which?"))),)
    rows = [family.renderer.encode(asked), family.renderer.encode((Message("user", (TextPart("hm?"),)),))]
    collate = Collator(family.processor, media_root=Path(), left=left)
    whole, deaf = collate(rows), collate.without(["audio", "video"])(rows)
    heard = whole["input_ids"] == family.processor.audio_token_id
    assert heard.any() and torch.equal(deaf["attention_mask"], whole["attention_mask"] * ~heard)
    there = whole["attention_mask"].bool()
    for index in range(2):
        own = deaf["position_ids"][index, there[index]]
        assert own.tolist() == list(range(len(own)))
    for name in set(whole) - {"attention_mask"}:
        assert torch.equal(deaf[name], whole[name]), name
    assert torch.equal(collate(rows)["attention_mask"], whole["attention_mask"]), "a copy was made"
