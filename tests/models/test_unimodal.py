"""Every kind of encoder by one function: the same features as the model called by hand, alone and in a batch."""

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from mmtune.errors import CapabilityError, DataError
from mmtune.models.encoders import LogMelConfig, PatchesConfig
from mmtune.models.inputs import load_preparation
from mmtune.models.log_mel import LogMelFeatureExtractor
from mmtune.models.unimodal import load_unimodal

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "cat", "sat", "on", "the", "mat", "dog", "ran", "home"]


def tokenizer() -> tf.PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]"
    )


def image_processor(size: int) -> object:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    square = {"height": size, "width": size}
    return CLIPImageProcessorPil(size=square, crop_size=square)


def clip_vision() -> dict:
    return {**SMALL, "image_size": 32, "patch_size": 8, "projection_dim": 16}


def clip() -> tf.CLIPModel:
    text = {**SMALL, "vocab_size": len(WORDS), "projection_dim": 16, "eos_token_id": 3, "max_position_embeddings": 16}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=clip_vision(), projection_dim=16))


def siglip_vision() -> tf.SiglipVisionModel:
    return tf.SiglipVisionModel(tf.SiglipVisionConfig(**SMALL, image_size=32, patch_size=8))


def llava() -> tf.LlavaForConditionalGeneration:
    text = tf.LlamaConfig(**SMALL, vocab_size=len(WORDS), num_key_value_heads=2)
    config = tf.LlavaConfig(vision_config=tf.CLIPVisionConfig(**clip_vision()), text_config=text, image_token_id=4)
    return tf.LlavaForConditionalGeneration(config)


def t5() -> tf.T5Config:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return tf.T5Config(**sizes, vocab_size=len(WORDS), pad_token_id=0, decoder_start_token_id=0)


WHISPER = tf.WhisperConfig(
    d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=1,
)  # fmt: skip
WAV2VEC2 = {**SMALL, "conv_dim": (16, 16, 16), "conv_kernel": (10, 3, 3), "conv_stride": (5, 4, 4)}
WAV2VEC2 |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 32}
MAKERS = {
    "clip": ("image", clip),
    "clip_vision": ("image", lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**clip_vision()))),
    "siglip_vision": ("image", siglip_vision),
    "vit": ("image", lambda: tf.ViTModel(tf.ViTConfig(**SMALL, image_size=32, patch_size=8))),
    "dinov2": ("image", lambda: tf.Dinov2Model(tf.Dinov2Config(**SMALL, image_size=32, patch_size=8))),
    "patches": ("image", lambda: tf.AutoModel.from_config(PatchesConfig(**SMALL, image_size=32))),
    "llava": ("image", llava),
    "whisper": ("audio", lambda: tf.WhisperModel(WHISPER)),
    "wav2vec2_group": ("audio", lambda: tf.Wav2Vec2Model(tf.Wav2Vec2Config(**WAV2VEC2))),
    "wav2vec2_layer": (
        "audio",
        lambda: tf.Wav2Vec2Model(tf.Wav2Vec2Config(**WAV2VEC2, feat_extract_norm="layer", do_stable_layer_norm=True)),
    ),
    "ast": ("audio", lambda: tf.ASTModel(tf.ASTConfig(**SMALL, max_length=128, num_mel_bins=32))),
    "log_mel": ("audio", lambda: tf.AutoModel.from_config(LogMelConfig(**SMALL))),
    "bert": ("text", lambda: tf.BertModel(tf.BertConfig(**SMALL, vocab_size=len(WORDS)))),
    "clip_text": ("text", clip),
    "t5": ("text", lambda: tf.T5Model(t5())),
    "t5_encoder": ("text", lambda: tf.T5EncoderModel(t5())),
    "llama": ("text", lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, vocab_size=len(WORDS)))),
    "llava_text": ("text", llava),
}
EXTRACTORS = {
    "whisper": lambda: tf.WhisperFeatureExtractor(),
    "wav2vec2_group": lambda: tf.Wav2Vec2FeatureExtractor(return_attention_mask=False),
    "wav2vec2_layer": lambda: tf.Wav2Vec2FeatureExtractor(return_attention_mask=True),
    "ast": lambda: tf.ASTFeatureExtractor(max_length=128, num_mel_bins=32),
    "log_mel": lambda: LogMelFeatureExtractor(),
}


@pytest.fixture(scope="module", params=MAKERS)
def saved(request, tmp_path_factory):
    """Name, kind and folder of an encoder with random weights."""
    kind, make = MAKERS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    make().save_pretrained(folder)
    part = {"image": lambda: image_processor(32), "text": tokenizer}.get(kind) or EXTRACTORS[request.param]
    part().save_pretrained(folder)
    return request.param, kind, folder


def raw(kind: str) -> list:
    """Three members, of different lengths where the kind has lengths."""
    rng = np.random.default_rng(0)
    if kind == "image":
        return [Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)) for _ in range(3)]
    if kind == "audio":
        return [rng.normal(0, 0.1, size).astype(np.float32) for size in (8000, 3000, 8000)]
    return ["a red cat", "the dog ran home on the mat", "unseen"]


def test_a_member_has_the_same_features_alone_and_in_a_batch(saved):
    name, kind, folder = saved
    prepare, encoder = load_preparation(str(folder), kind), load_unimodal(str(folder), kind)
    inputs = [prepare.inputs(one) for one in raw(kind)]
    together = encoder(inputs)
    for one, made in zip(inputs, together, strict=True):
        (alone,) = encoder([one])
        np.testing.assert_allclose(alone.tokens, made.tokens, atol=2e-5)
        np.testing.assert_allclose(alone.pooled, made.pooled, atol=2e-5)
        assert alone.tokens.ndim == 2 and np.isfinite(alone.tokens).all() and alone.tokens.dtype == np.float32
    if kind != "image" and name != "ast":
        assert len(together[1].tokens) != len(together[0].tokens)
    assert np.abs(together[0].pooled - together[2].pooled).max() > 1e-5


def test_features_are_those_of_the_model_called_by_hand(saved):
    name, kind, folder = saved
    (made,) = load_unimodal(str(folder), kind)([load_preparation(str(folder), kind).inputs(raw(kind)[0])])
    loads = tf.T5EncoderModel if name.startswith("t5") else tf.AutoModel
    model = loads.from_pretrained(folder).eval()
    tokens, pooled = by_hand(name, model, raw(kind)[0], folder)
    np.testing.assert_allclose(made.tokens, tokens, atol=1e-6)
    np.testing.assert_allclose(made.pooled, pooled, atol=1e-6)


@torch.inference_mode()
def by_hand(name: str, model, one, folder):
    """Returns the features as the documentation of each model makes them."""
    if MAKERS[name][0] == "text":
        ids = tokenizer()(one, return_tensors="pt")
        if name == "clip_text":
            states, pooled = model.text_model(**ids).last_hidden_state, model.get_text_features(**ids).pooler_output
            return states[0], pooled[0]
        states = (model.language_model if name == "llava_text" else model)(
            input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]
        ).last_hidden_state[0]
        return states, states.mean(0)
    if MAKERS[name][0] == "image":
        pixels = image_processor(32)(one, return_tensors="pt")
        if name == "clip":
            states = model.vision_model(**pixels).last_hidden_state
            return states[0], model.get_image_features(**pixels).pooler_output[0]
        if name == "llava":
            states = model.get_image_features(**pixels).pooler_output[0]
            return states, states.mean(0)
        made = model(**pixels)
        return made.last_hidden_state[0], made.pooler_output[0]
    inputs = EXTRACTORS[name]()(one, sampling_rate=16000, return_tensors="pt")
    if name == "whisper":
        states = model.encoder(inputs["input_features"]).last_hidden_state[0, : len(one) // 160 // 2]
        return states, states.mean(0)
    made = model(**inputs)
    pooled = made.pooler_output[0] if name in ("ast", "log_mel") else made.last_hidden_state[0].mean(0)
    return made.last_hidden_state[0], pooled


def test_a_checkpoint_of_a_classifier_has_no_random_pooler(tmp_path):
    config = tf.ViTConfig(**SMALL, image_size=32, patch_size=8)
    tf.ViTForImageClassification(config).save_pretrained(tmp_path)
    image_processor(32).save_pretrained(tmp_path)
    inputs = load_preparation(str(tmp_path), "image").inputs(raw("image")[0])
    (made,) = load_unimodal(str(tmp_path), "image")([inputs])
    np.testing.assert_allclose(made.pooled, made.tokens.mean(0), atol=1e-6)


def test_pools_first_last_and_statistics(tmp_path):
    torch.manual_seed(0)
    tf.BertModel(tf.BertConfig(**SMALL, vocab_size=len(WORDS))).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    inputs = [load_preparation(str(tmp_path), "text").inputs(text) for text in raw("text")]
    for pool, expected in (
        ("first", lambda tokens: tokens[0]),
        ("last", lambda tokens: tokens[-1]),
        ("stats", lambda tokens: np.concatenate([tokens.mean(0), tokens.std(0)])),
    ):
        for made in load_unimodal(str(tmp_path), "text", pool=pool)(inputs):
            np.testing.assert_allclose(made.pooled, expected(made.tokens), atol=2e-5)


def test_a_sentence_transformers_folder_names_its_pooling(tmp_path):
    tf.BertModel(tf.BertConfig(**SMALL, vocab_size=len(WORDS))).save_pretrained(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    file = tmp_path / "1_Pooling" / "config.json"
    file.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    assert load_unimodal(str(tmp_path), "text").pool == "first"
    file.write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(CapabilityError, match="max_tokens"):
        load_unimodal(str(tmp_path), "text")


def test_a_long_text_is_cut_at_the_models_places(tmp_path):
    tf.BertModel(tf.BertConfig(**SMALL, vocab_size=len(WORDS), max_position_embeddings=8)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    inputs = load_preparation(str(tmp_path), "text").inputs("a red cat " * 20)
    assert inputs["input_ids"].shape == (1, 8)
    (made,) = load_unimodal(str(tmp_path), "text")([inputs])
    assert made.tokens.shape == (8, 32)


def test_a_model_without_the_part_is_refused(tmp_path):
    tf.BertModel(tf.BertConfig(**SMALL, vocab_size=len(WORDS))).save_pretrained(tmp_path)
    with pytest.raises(CapabilityError, match="takes no image"):
        load_unimodal(str(tmp_path), "image")
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(DataError, match="safetensors"):
        load_unimodal(str(tmp_path), "text")
