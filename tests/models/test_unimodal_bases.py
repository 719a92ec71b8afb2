"""The default encoders: the towers and states of every family of base models, alone and in a batch."""

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

from mmtune.errors import CapabilityError, RecipeError
from mmtune.models.inputs import load_preparation
from mmtune.models.unimodal import load_unimodal

TRAINING = Path(__file__).parents[1] / "training" / "conftest.py"
PARTS = ("tokenizer", "image_processor", "feature_extractor")
IMAGES = (
    "llava llava_next llava_onevision qwen2_vl qwen2_5_vl qwen3_vl idefics3 smolvlm internvl gemma3".split()  # noqa: SIM905
)


@cache
def families():
    spec = importlib.util.spec_from_file_location("training_conftest", TRAINING)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def saved(name: str, folder: Path) -> None:
    family = families().tiny(name)
    family.model.save_pretrained(folder)
    for part in PARTS:
        if getattr(family.processor, part, None) is not None:
            getattr(family.processor, part).save_pretrained(folder)
    if isinstance(family.processor, tf.PreTrainedTokenizerBase):
        family.processor.save_pretrained(folder)


def check(folder: Path, kind: str, raw: list) -> list:
    """Returns the features of a batch, after comparing each with that of its member alone."""
    prepare, encoder = load_preparation(str(folder), kind), load_unimodal(str(folder), kind)
    inputs = [prepare.inputs(one) for one in raw]
    made = encoder(inputs)
    for one, together in zip(inputs, made, strict=True):
        (alone,) = encoder([one])
        np.testing.assert_allclose(alone.tokens, together.tokens, atol=1e-5)
        np.testing.assert_allclose(alone.pooled, alone.tokens.mean(0), atol=1e-5)
    return made


@pytest.mark.parametrize("name", IMAGES)
def test_images_have_what_the_language_model_reads(name, tmp_path):
    saved(name, tmp_path)
    rng = np.random.default_rng(0)
    raw = [Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)) for size in ((56, 84), (100, 40), (56, 84))]
    made = check(tmp_path, "image", raw)
    model = tf.AutoModel.from_pretrained(tmp_path).eval()
    image = tf.AutoImageProcessor.from_pretrained(tmp_path)(images=[raw[1]], return_tensors="pt")
    wanted = {"pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask"}
    with torch.inference_mode():
        found = model.get_image_features(**{key: image[key] for key in image if key in wanted}, return_dict=True)
    rows = found.pooler_output
    rows = rows if torch.is_tensor(rows) else torch.cat([part.reshape(-1, part.shape[-1]) for part in rows])
    np.testing.assert_allclose(made[1].tokens, rows.reshape(-1, rows.shape[-1]), atol=1e-6)
    assert made[0].tokens.shape[1] == model.config.get_text_config().hidden_size


@pytest.mark.parametrize("name", ["qwen2_5_omni", "audio_flamingo3"])
def test_sounds_have_features_of_their_own_length(name, tmp_path):
    saved(name, tmp_path)
    sounds = [np.random.default_rng(0).normal(0, 0.1, size).astype(np.float32) for size in (16000, 9000)]
    made = check(tmp_path, "audio", sounds)
    assert len(made[1].tokens) < len(made[0].tokens) <= 25


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "smolvlm", "gemma3", "text_qwen2_5"])
def test_texts_have_the_last_hidden_states(name, tmp_path):
    saved(name, tmp_path)
    made = check(tmp_path, "text", ["a cat", "the dog ran home", "b"])
    assert len(made[1].tokens) > len(made[2].tokens)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    families().tiny("text_llama3").model.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="no text processor"):
        load_preparation(str(tmp_path), "text")


def test_a_family_that_gives_no_features_is_refused_by_name(tmp_path):
    saved("qwen2_audio", tmp_path)
    with pytest.raises(CapabilityError, match="qwen2_audio"):
        load_unimodal(str(tmp_path), "audio")
