"""Tiny models of every family, with the processors of the encoding tests."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.training import flex_kernel

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}


@cache
def encoding_tests() -> ModuleType:
    path = Path(__file__).parents[1] / "encoding" / "conftest.py"
    spec = importlib.util.spec_from_file_location("encoding_conftest", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return {**TEXT, "vocab_size": len(tokenizer), **special, **more}


def _llava(processor: Any, tokenizer: Any) -> Any:
    import transformers as t

    select = processor.vision_feature_select_strategy
    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(**VISION),
            text_config=t.LlamaConfig(**_text(tokenizer)),
            image_token_id=processor.image_token_id,
            vision_feature_select_strategy=select,
        )
    )


def _llava_bytes(processor: Any, tokenizer: Any) -> Any:
    """A tower without a class token."""
    import transformers as t

    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            vision_config=t.SiglipVisionConfig(**VISION),
            text_config=t.MistralConfig(**_text(tokenizer, sliding_window=12)),
            image_token_id=processor.image_token_id,
            vision_feature_select_strategy="full",
        )
    )


def _llava_next(processor: Any, tokenizer: Any) -> Any:
    import transformers as t

    return t.LlavaNextForConditionalGeneration(
        t.LlavaNextConfig(
            vision_config=t.CLIPVisionConfig(**VISION),
            text_config=t.LlamaConfig(**_text(tokenizer)),
            image_token_id=processor.image_token_id,
            image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
        )
    )


def _llava_onevision(processor: Any, tokenizer: Any) -> Any:
    import transformers as t

    return t.LlavaOnevisionForConditionalGeneration(
        t.LlavaOnevisionConfig(
            vision_config=t.SiglipVisionConfig(**VISION),
            text_config=t.Qwen2Config(**_text(tokenizer)),
            image_token_id=processor.image_token_id,
            image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
            vision_aspect_ratio="anyres_max_3",
        )
    )


def _mrope(tokenizer: Any) -> dict[str, Any]:
    quarter = TEXT["head_dim"] // 8
    section = [2 * quarter, quarter, quarter]
    return _text(tokenizer, rope_parameters={"rope_type": "default", "mrope_section": section, "rope_theta": 1e4})


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    return {key: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}


def _qwen2_vl(processor: Any, tokenizer: Any) -> Any:
    import transformers as t

    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    config = t.Qwen2VLConfig(vision_config=vision, text_config=_mrope(tokenizer), **_qwen_ids(tokenizer))
    return t.Qwen2VLForConditionalGeneration(config)


def _windowed_vision() -> dict[str, Any]:
    sizes = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    return {**sizes, "patch_size": 14, "fullatt_block_indexes": [1], "window_size": 56}


def _qwen2_5_vl(processor: Any, tokenizer: Any) -> Any:
    import transformers as t

    config = t.Qwen2_5_VLConfig(vision_config=_windowed_vision(), text_config=_mrope(tokenizer), **_qwen_ids(tokenizer))
    return t.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl(processor: Any, tokenizer: Any) -> Any:
    import transformers as t

    vision = {"depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 14, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    config = t.Qwen3VLConfig(vision_config=vision, text_config=_mrope(tokenizer), **_qwen_ids(tokenizer))
    return t.Qwen3VLForConditionalGeneration(config)


def _omni(processor: Any, tokenizer: Any) -> Any:
    import transformers as t

    ids = {
        "image_token_id": "<|IMAGE|>",
        "audio_token_id": "<|AUDIO|>",
        "video_token_id": "<|VIDEO|>",
        "vision_start_token_id": "<|vision_bos|>",
        "vision_end_token_id": "<|vision_eos|>",
        "audio_start_token_id": "<|audio_bos|>",
        "audio_end_token_id": "<|audio_eos|>",
    }
    audio = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "output_dim": 32}
    audio |= {"num_mel_bins": 80}
    config = t.Qwen2_5OmniThinkerConfig(
        audio_config=audio,
        vision_config=_windowed_vision(),
        text_config=_mrope(tokenizer),
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in ids.items()},
    )
    return t.Qwen2_5OmniThinkerForConditionalGeneration(config)


def _qwen2_audio(processor: Any, tokenizer: Any) -> Any:
    import transformers as t

    audio = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    audio |= {"num_mel_bins": 80}
    config = t.Qwen2AudioConfig(
        audio_config=audio,
        text_config=t.Qwen2Config(**_text(tokenizer)).to_dict(),
        audio_token_id=processor.audio_token_id,
    )
    return t.Qwen2AudioForConditionalGeneration(config)


def _flamingo(processor: Any, tokenizer: Any) -> Any:
    import transformers as t

    config = t.AudioFlamingo3Config(
        audio_config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "num_mel_bins": 80,
        },
        text_config=t.Qwen2Config(**_text(tokenizer)).to_dict(),
        audio_token_id=processor.audio_token_id,
    )
    return t.AudioFlamingo3ForConditionalGeneration(config)


def _idefics(name: str) -> Any:
    def build(processor: Any, tokenizer: Any) -> Any:
        import transformers as t

        config = getattr(t, f"{name}Config")(
            vision_config=VISION,
            text_config=t.LlamaConfig(**_text(tokenizer)),
            image_token_id=processor.image_token_id,
            scale_factor=2,
        )
        return getattr(t, f"{name}ForConditionalGeneration")(config)

    return build


def _internvl(processor: Any, tokenizer: Any) -> Any:
    import transformers as t

    vision = {**VISION, "image_size": [28, 28], "patch_size": [7, 7]}
    return t.InternVLForConditionalGeneration(
        t.InternVLConfig(
            vision_config=t.InternVLVisionConfig(**vision),
            text_config=t.Qwen2Config(**_text(tokenizer)),
            image_token_id=processor.image_token_id,
        )
    )


def _gemma3(processor: Any, tokenizer: Any) -> Any:
    """A window shorter than a row, so that both kinds of layer matter."""
    import transformers as t

    kinds = ["sliding_attention", "full_attention"]
    text = _text(tokenizer, pad_token_id=0, sliding_window=10, layer_types=kinds, query_pre_attn_scalar=8)
    return t.Gemma3ForConditionalGeneration(
        t.Gemma3Config(
            vision_config=VISION,
            text_config=text,
            mm_tokens_per_image=4,
            image_token_id=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
            boi_token_id=tokenizer.convert_tokens_to_ids("<start_of_image>"),
            eoi_token_id=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        )
    )


def _plain(name: str, **more: Any) -> Any:
    def build(processor: Any, tokenizer: Any) -> Any:
        import transformers as t

        return getattr(t, f"{name}ForCausalLM")(getattr(t, f"{name}Config")(**_text(tokenizer, **more)))

    return build


def _composite(projector: str = "mlp", **fusion: Any) -> Any:
    """The project's own model out of parts, whatever its processor reads."""

    def build(processor: Any, tokenizer: Any) -> Any:
        import transformers as t

        from mmtune.models.composite.config import CompositeConfig
        from mmtune.models.composite.model import CompositeForConditionalGeneration
        from mmtune.models.encoders import HistoryConfig, LogMelConfig

        layers = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        whisper = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2}
        whisper |= {"decoder_layers": 1, "decoder_attention_heads": 2, "vocab_size": 60, "pad_token_id": 0}
        sounds = {
            "LogMelFeatureExtractor": LogMelConfig(**layers, intermediate_size=24, num_mel_bins=16),
            "WhisperFeatureExtractor": t.WhisperConfig(**whisper, encoder_ffn_dim=24, max_source_positions=500),
            "Wav2Vec2FeatureExtractor": t.Wav2Vec2Config(
                **layers, intermediate_size=24, conv_dim=[8, 8], conv_kernel=[400, 3], conv_stride=[320, 2],
                num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, layerdrop=0.0,
                hidden_dropout=0.0, activation_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0,
                apply_spec_augment=False,
            ),
        }  # fmt: skip
        settings = {"kind": projector, **({} if projector in ("linear", "mlp") else {"queries": 4, "heads": 4})}
        config = CompositeConfig(
            vision_config=t.CLIPVisionConfig(**VISION) if processor.image_processor else None,
            audio_config=sounds[type(processor.feature_extractor).__name__],
            text_config=t.Qwen2Config(**_text(tokenizer)),
            behaviour_config=HistoryConfig(**layers, intermediate_size=24, vocab_size=12, window=5)
            if processor.items
            else None,
            image_token_id=processor.image_token_id,
            audio_token_id=processor.audio_token_id,
            behaviour_token_id=processor.behaviour_token_id,
            audio_convolutions=processor.audio_convolutions,
            projectors=dict.fromkeys(("image", "audio", "behaviour"), settings),
            fusion=fusion,
            frame_times=True,
        )
        return CompositeForConditionalGeneration(config)

    return build


MODELS = {
    "llava": _llava,
    "llava_bytes": _llava_bytes,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen2_5_omni": _omni,
    "qwen2_audio": _qwen2_audio,
    "audio_flamingo3": _flamingo,
    "idefics3": _idefics("Idefics3"),
    "smolvlm": _idefics("SmolVLM"),
    "internvl": _internvl,
    "gemma3": _gemma3,
    "composite": _composite(),
    "composite_whisper": _composite("linear"),
    "composite_wav2vec2": _composite(),
    "composite_perceiver": _composite("perceiver"),
    "composite_late": _composite(mode="late"),
    "composite_hybrid": _composite(mode="hybrid", instruction=True),
    "composite_cross": _composite(attention="cross", layers=[1]),
    "composite_late_cross": _composite(mode="late", attention="cross", layers=[0, 1]),
    "text_llama3": _plain("Llama"),
    "text_phi3": _plain("Phi3"),
    "text_qwen3": _plain("Qwen3"),
    "text_qwen2_5": _plain(
        "Qwen2", use_sliding_window=True, sliding_window=9, layer_types=["full_attention", "sliding_attention"]
    ),
}


@cache
def tiny(name: str) -> SimpleNamespace:
    """Returns ``processor``, ``renderer``, ``takes`` and ``model`` in fp32 with random weights."""
    # One processor serves all the ways to fuse.
    base = name if name in encoding_tests()._FAMILIES else "composite"
    family = encoding_tests().family(base if "perceiver" not in name else "composite_queries")
    torch.manual_seed(0)
    model = MODELS[name](family.processor, getattr(family.processor, "tokenizer", family.processor))
    # Fresh weights are so small that a wrong mask would hardly show, and some gates start shut.
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            if own.endswith("gate") or own.endswith("gate.bias"):
                parameter.normal_(0.0, 1.0)
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return SimpleNamespace(**vars(family), model=model.eval())


@pytest.fixture(scope="session")
def tiny_family() -> Any:
    return tiny


@pytest.fixture
def wide_family(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same with heads of 16 channels: FlexAttention on a GPU takes none narrower."""
    for name, value in {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}.items():
        monkeypatch.setitem(TEXT, name, value)
    return tiny.__wrapped__


@pytest.fixture(scope="session")
def media() -> Any:
    return encoding_tests()._Media()


@pytest.fixture
def served(monkeypatch: Any) -> dict[str, Any]:
    """Media by path, served in the place of files."""
    store: dict[str, Any] = {}
    import mmtune.media.load as load

    monkeypatch.setattr(load, "load_image", lambda root, medium: store[medium.path])
    monkeypatch.setattr(load, "load_audio", lambda root, medium, rate: store[medium.path])
    return store


@pytest.fixture
def flex_by_hand(monkeypatch: Any) -> None:
    flex_kernel.by_hand(monkeypatch)


@pytest.fixture
def tree_table() -> Any:
    """Three trees as a table of tokens/: with two media, with none, and a plain conversation."""
    import numpy as np
    import pyarrow as pa

    from mmtune.encoding.render import MediaSpan
    from mmtune.encoding.tree import TREE_SCHEMA, Tree, tree_to_row
    from mmtune.records import Medium

    def tree(branch: list[int], *spans: tuple[int, int]) -> Tree:
        ids, names = np.array(branch, np.int32), tuple(f"row{k}" for k in range(max(branch)))
        media = tuple(MediaSpan(Medium("image", "a.png", width=4, height=4), *span) for span in spans)
        return Tree(ids, np.full_like(ids, -100), ids, media, names, (1.0,) * len(names))

    trees = [tree([0, 0, 0, 1, 1, 1, 2, 2], (1, 2), (4, 1)), tree([0, 1, 2]), tree([1, 1, 1, 1])]
    return pa.Table.from_pylist([tree_to_row(item) for item in trees], schema=TREE_SCHEMA)


def pytest_generate_tests(metafunc: Any) -> None:
    if "family_name" in metafunc.fixturenames:
        metafunc.parametrize("family_name", list(MODELS))
