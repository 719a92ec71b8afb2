"""Parts keep their weights and what they compute; a composite folder is one more model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

from mmtune.encoding.processor import load_processor
from mmtune.errors import CapabilityError, RecipeError
from mmtune.models.composite.assemble import assemble
from mmtune.models.encoders import LogMelConfig, PatchesConfig
from mmtune.models.load import load_model
from mmtune.models.unused_layers import skip_unused_layers
from tests.training.conftest import encoding_tests

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    tokenizer = encoding_tests().byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    t.Qwen2ForCausalLM(t.Qwen2Config(**SMALL, vocab_size=len(tokenizer), num_key_value_heads=2)).save_pretrained(folder)
    return folder


def saved_encoders(folder: Path) -> dict[str, Any]:
    vision, text = {**SMALL, "image_size": 28, "patch_size": 7}, {**SMALL, "vocab_size": 60}
    t.CLIPModel(t.CLIPConfig(vision_config=vision, text_config=text)).save_pretrained(folder / "clip")
    encoding_tests()._clip().save_pretrained(folder / "clip")
    whisper = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "decoder_layers": 1, "vocab_size": 60}
    whisper |= {"decoder_attention_heads": 2, "max_source_positions": 100, "num_mel_bins": 80, "pad_token_id": 0}
    t.WhisperModel(t.WhisperConfig(**whisper)).save_pretrained(folder / "whisper")
    t.WhisperFeatureExtractor(chunk_length=2).save_pretrained(folder / "whisper")
    return {"image": str(folder / "clip"), "audio": str(folder / "whisper")}


def test_pretrained_parts_keep_their_weights(language: Path, tmp_path: Path) -> None:
    encoders = saved_encoders(tmp_path)
    model, processor = assemble(str(language), encoders=encoders)
    own, lm = model.model, t.AutoModelForCausalLM.from_pretrained(language)
    clip, whisper = (t.AutoModel.from_pretrained(encoders[name]) for name in ("image", "audio"))
    pixels, mel = torch.randn(1, 3, 28, 28), torch.randn(1, 80, 200)
    expected = clip.vision_model(pixels).last_hidden_state
    torch.testing.assert_close(own.vision_tower(pixels).last_hidden_state, expected)
    torch.testing.assert_close(own.audio_tower(mel).last_hidden_state, whisper.encoder(mel).last_hidden_state)
    ids = torch.randint(0, lm.config.vocab_size, (1, 9))
    torch.testing.assert_close(model(ids).logits[..., : lm.config.vocab_size], lm(ids).logits)
    old = lm.get_input_embeddings().weight
    added = own.get_input_embeddings().weight[processor.image_token_id]
    torch.testing.assert_close(added, old.mean(0))
    assert processor.image_tokens == 16 and processor.sound_tokens(16_000) == 50


@pytest.mark.parametrize("kind", ["mlp", "qformer"])
@pytest.mark.parametrize("mode", ["early", "hybrid"])
def test_a_folder_like_any_other(language: Path, tmp_path: Path, kind: str, mode: str) -> None:
    more = {} if kind == "mlp" else {"queries": 3, "heads": 4}
    encoders = {
        "image": PatchesConfig(**SMALL, image_size=28, patch_size=14),
        "audio": LogMelConfig(**SMALL, num_mel_bins=16, mel_mean=0.4, mel_std=0.3),
    }
    settings = {"vision_feature_layer": None, "vision_feature_select_strategy": "full"}
    projectors = {name: {"kind": kind, **more} for name in encoders}
    model, processor = assemble(
        str(language), encoders=encoders, projectors=projectors, fusion={"mode": mode}, **settings
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reader = load_model(str(tmp_path)), load_processor(str(tmp_path))
    assert reader.image_tokens == (4 if kind == "mlp" else 3)
    assert (reader.feature_extractor.mel_mean, reader.feature_extractor.mel_std) == (0.4, 0.3)
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "audio"}, {"type": "text", "text": "which?"}]}]
    given = reader(
        text=reader.apply_chat_template(talk, add_generation_prompt=True),
        images=[torch.zeros(3, 40, 50, dtype=torch.uint8).numpy()],
        audio=[torch.randn(9_000).numpy()],
        sampling_rate=16_000,
        return_tensors="pt",
    )
    torch.testing.assert_close(again(**given).logits, model(**given).logits)
    assert again.generate(**given, max_new_tokens=3).shape[1] == given["input_ids"].shape[1] + 3


def test_parts_that_do_not_fit(language: Path) -> None:
    with pytest.raises(RecipeError, match="no encoder of"):
        assemble(str(language), encoders={"smell": PatchesConfig()})
    with pytest.raises(RecipeError, match="no tokenizer"):
        assemble(t.Qwen2Config(**SMALL), encoders={"image": PatchesConfig()})
    with pytest.raises(RecipeError, match="refuses what its image processor makes"):
        assemble(
            str(language),
            encoders={"image": PatchesConfig(**SMALL)},
            preprocessors={"image": encoding_tests()._clip(56)},
            vision_feature_layer=None,
        )


def test_every_place_of_a_map_is_a_token(language: Path, tmp_path: Path) -> None:
    """ResNet and its like make maps (N, C, Y, X), each layer of another width; SigLIP 2 wants places too."""
    resnet = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    size = {"height": 32, "width": 32}
    shown = {"image": t.CLIPImageProcessor(size=size, crop_size=size)}
    model, processor = assemble(str(language), encoders={"image": resnet}, preprocessors=shown)
    assert processor.image_tokens == 16
    pixels = torch.randn(1, 3, 32, 32)
    tokens = model.model.vision_tower(pixels).last_hidden_state.flatten(2).transpose(1, 2)
    torch.testing.assert_close(
        model.get_image_features(pixels).pooler_output[0], model.model.multi_modal_projector(tokens, None, None)[0]
    )
    swin = t.SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    model, _ = assemble(str(language), encoders={"image": swin}, preprocessors=shown)
    # Of its stages none is left out as unused: they hand on more than one tensor.
    assert skip_unused_layers(model) == 0
    model.get_image_features(pixels)
    places = t.Siglip2VisionConfig(**SMALL, num_patches=16, patch_size=8)
    with pytest.raises(CapabilityError, match="Siglip2VisionModel wants pixel_attention_mask and spatial_shapes too"):
        assemble(str(language), encoders={"image": places}, preprocessors=shown)


def test_parts_of_multimodal_models_are_taken(repository: Path) -> None:
    """The bundled bases apart: their towers and language models compute what they did, under a new projector."""
    base, omni = (str(repository / "data" / name) for name in ("base", "omni"))
    model, processor = assemble(base, encoders={"image": base, "audio": omni}, fusion={"mode": "hybrid"})
    llava, composite = load_model(base), load_model(omni)
    expected = dict(llava.named_parameters())
    for name, own in model.named_parameters():
        if name.startswith("model.vision_tower."):
            assert torch.equal(own, expected[name]), name
    for name, own in composite.model.audio_tower.named_parameters():
        assert torch.equal(model.model.audio_tower.get_parameter(name), own), name
    assert (model.config.vision_feature_layer, model.config.vision_feature_select_strategy) == (-1, "default")
    ids = torch.randint(5, 800, (1, 9))
    old = llava.config.text_config.vocab_size
    torch.testing.assert_close(model(ids).logits[..., :old], llava(ids).logits)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert processor.image_tokens == 16 and processor.sound_tokens(8_000) > 0
    # The base's own template knows of no sound.
    talk = [{"role": "user", "content": [{"type": "audio"}, {"type": "image"}, {"type": "text", "text": "?"}]}]
    assert processor.apply_chat_template(talk) == "<|im_start|>user\n<audio><image>?<|im_end|>\n"
