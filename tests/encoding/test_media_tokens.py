"""Token counts from header sizes equal those of the real processor on real pixels and samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mmtune.encoding.media_tokens import MediaCounter, process_audio, process_images
from mmtune.encoding.refused import Refused
from mmtune.records import Medium

SIZES = [
    (1, 1), (1, 40), (40, 1), (2, 399), (399, 2), (1, 500), (500, 1), (27, 28), (28, 28), (29, 57), (56, 28),
    (57, 84), (84, 85), (100, 33), (33, 100), (141, 90), (200, 200), (320, 240), (251, 119),
]  # fmt: skip
SAMPLES = [1, 159, 160, 161, 399, 1_600, 16_000, 16_001, 47_999, 479_999, 480_000, 480_001, 700_000]
HEARD_SECONDS = {"qwen2_audio": 30, "qwen2_5_omni": 30, "composite_whisper": 10}


@pytest.mark.parametrize("alone", [True, False])
def test_image_counts_over_a_grid_of_sizes(image_family: Any, media: Any, alone: bool) -> None:
    processor = image_family.processor
    counter = MediaCounter(processor)
    for width, height in SIZES:
        medium, real = media.image(width, height)
        batch = [real["image"]] if alone else [real["image"], real["image"]]
        try:
            expected = process_images(processor, [batch])[1][0]
        except (ValueError, ZeroDivisionError, IndexError, TypeError, RuntimeError):
            expected = None
        if not expected:
            with pytest.raises(Refused):
                counter.expansion(medium, len(batch))
        else:
            assert counter.expansion(medium, len(batch)) == expected, (width, height)
    assert not counter.notes


def test_audio_counts_over_lengths_and_rates(audio_family: Any, media: Any) -> None:
    from mmtune.media.audio import resample

    processor = audio_family.processor
    counter = MediaCounter(processor)
    for rate in (16_000, 44_100, 8_000):
        for samples in SAMPLES if rate == 16_000 else (800, 44_101):
            medium, real = media.audio(samples, rate)
            try:
                expected = process_audio(processor, [resample(real["audio"], rate, 16_000)])[1][0]
            except (ValueError, RuntimeError):
                expected = None
            heard = HEARD_SECONDS.get(audio_family.name)
            if heard and samples > heard * rate:
                # The processor would cut its end off.
                with pytest.raises(Refused, match="media_too_long"):
                    counter.expansion(medium, 0)
            elif not expected:
                with pytest.raises(Refused):
                    counter.expansion(medium, 0)
            else:
                assert counter.expansion(medium, 0) == expected, (samples, rate)
    assert not counter.notes


def test_a_family_without_a_rule_runs_the_processor_and_says_so(family_of: Any, media: Any) -> None:
    known = family_of("idefics3").processor

    class Unknown(type(known)):  # type: ignore[misc]
        """Same processor under a name that no rule knows."""

    stranger = object.__new__(Unknown)
    stranger.__dict__.update(known.__dict__)
    for base in (Unknown.__mro__[1],):
        assert base.__name__ == "Idefics3Processor"
    from mmtune.encoding import media_tokens

    rules = dict(media_tokens._IMAGE_STUBS)
    try:
        media_tokens._IMAGE_STUBS.pop("Idefics3Processor")
        counter = MediaCounter(stranger)
        for width, height in [(40, 30), (90, 20)]:
            medium, real = media.image(width, height)
            assert counter.expansion(medium, 1) == process_images(known, [[real["image"]]])[1][0]
    finally:
        media_tokens._IMAGE_STUBS.update(rules)
    assert len(counter.notes) == 1 and "Unknown" in counter.notes[0]


def test_a_wrong_rule_is_given_up(family_of: Any, media: Any, monkeypatch: Any) -> None:
    from mmtune.encoding import media_tokens

    processor = family_of("llava").processor
    monkeypatch.setitem(
        media_tokens._IMAGE_STUBS,
        "LlavaProcessor",
        lambda own, height, width, alone: {"pixel_values": [np.zeros((3, 7, 14))]},
    )
    counter = MediaCounter(processor)
    medium, real = media.image(30, 20)
    true = process_images(processor, [[real["image"]]])[1][0]
    assert counter.expansion(medium, 1) != true
    assert not counter.check(medium, true)
    assert counter.expansion(medium, 1) == true
    assert any("not that of" in note for note in counter.notes)


def test_media_without_header_or_support_are_refused(family_of: Any) -> None:
    counter = MediaCounter(family_of("llava").processor)
    with pytest.raises(Refused, match="media_unprobed"):
        counter.expansion(Medium("image", "x.png"), 1)
    with pytest.raises(Refused, match="modality_unsupported"):
        counter.placeholder("audio")
    with pytest.raises(Refused, match="modality_unsupported"):
        MediaCounter(family_of("text_qwen3").processor).placeholder("image")
