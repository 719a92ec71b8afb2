"""The composite processor: saved and loaded whole, and its counts known from headers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmtune.encoding.processor import load_processor, processor_fingerprint
from mmtune.models.composite.processor import CompositeProcessor
from tests.training.conftest import encoding_tests

NAMES = ["composite", "composite_whisper", "composite_wav2vec2"]


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_by_the_auto_class(name: str, tmp_path: Path) -> None:
    own = encoding_tests().family(name).processor
    own.save_pretrained(tmp_path)
    again = load_processor(str(tmp_path))
    assert isinstance(again, CompositeProcessor)
    assert processor_fingerprint(again) == processor_fingerprint(own)
    assert processor_fingerprint(pickle.loads(pickle.dumps(own))) == processor_fingerprint(own)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("samples", [1, 399, 400, 401, 1_279, 1_281, 16_000, 40_000])
def test_sounds_take_the_tokens_that_their_length_says(name: str, samples: int) -> None:
    own = encoding_tests().family(name).processor
    expected = own.sound_tokens(samples)
    if not expected and samples < 400:
        pytest.skip("shorter than one window of samples")
    _, texts = own._process_audio([np.zeros(samples, np.float32), np.zeros(5_000, np.float32)], sampling_rate=16_000)
    assert texts[0] == own.audio_token * expected


def test_called_as_any_processor() -> None:
    own: Any = encoding_tests().family("composite").processor
    image, sound = np.zeros((30, 40, 3), np.uint8), np.zeros(9_000, np.float32)
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "audio"}, {"type": "text", "text": "which?"}]}]
    text = own.apply_chat_template(talk, add_generation_prompt=True)
    made = own(images=[image], text=text, audio=[sound], return_tensors="pt", sampling_rate=16_000)
    ids = made["input_ids"][0]
    assert (ids == own.image_token_id).sum() == 16
    assert (ids == own.audio_token_id).sum() == own.sound_tokens(9_000) == 14
    media = {"pixel_values", "input_features", "feature_attention_mask"}
    assert set(made) == {"input_ids", "attention_mask", "user_turns"} | media
    with pytest.raises(ValueError, match="the model reads none"):
        encoding_tests().family("composite_whisper").processor(text="which?", histories=[["318"]])
