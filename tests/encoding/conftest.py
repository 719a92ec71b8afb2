"""Tiny tokenizers and processors of every family, built on the spot; no downloads."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

TEXT = [
    "USER: What colour is the cat on the left? ASSISTANT: It is black and white.",
    "How many digits are there in this picture? There are three of them, hello world!",
    "system user assistant You are a helpful assistant. Audio 1: Picture 1: Frame1: \n\n",
    "Here is the original image and here are some crops to help you see better 0123456789",
]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}@IMAGE@"
    "{% elif part['type'] == 'audio' %}@AUDIO@{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
GRANITE = (
    "{% for message in messages %}<|start_of_role|>{{ message['role'] }}<|end_of_role|>"
    "{% for part in message['content'] %}{% if part['type'] == 'audio' %}<|audio|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)


def trl_template(name: str) -> str:
    pytest.importorskip("trl")
    return files("trl").joinpath("chat_templates", f"{name}.jinja").read_text("utf-8")


def byte_level(special: list[str], named: dict[str, str] | None = None, **options: Any) -> Any:
    """A byte-level BPE tokenizer as Qwen, Llama 3 and SmolLM have it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(TEXT * 3, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet))
    core.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=named or {}, **options)


def sentencepiece(special: list[str], named: dict[str, str] | None = None, **options: Any) -> Any:
    """A Metaspace Unigram tokenizer that puts a BOS first, as Llama 2 and Gemma have it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    base = ["<unk>", "<s>", "</s>"]
    letters = sorted(set("".join(TEXT)) | set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ<>|/_\n.,!?"))
    trainer = trainers.UnigramTrainer(vocab_size=260, special_tokens=base, unk_token="<unk>", initial_alphabet=letters)
    core.train_from_iterator(TEXT * 3, trainer)
    core.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token=options.pop("eos_token", "</s>"),
        unk_token="<unk>",
        extra_special_tokens=named or {},
        **options,
    )


def _qwen_tokens() -> list[str]:
    names = ["endoftext", "im_start", "im_end", "object_ref_start", "vision_start", "vision_end", "vision_pad"]
    return [f"<|{name}|>" for name in [*names, "image_pad", "video_pad"]]


def _qwen(name: str, template: str) -> Any:
    import transformers

    from mmtune.encoding.processor import without_video

    tokenizer = byte_level(_qwen_tokens(), eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"])
    images = transformers.Qwen2VLImageProcessor(
        size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 60}, patch_size=14, merge_size=2
    )
    return without_video(getattr(transformers, name), {}, tokenizer=tokenizer, image_processor=images), trl_template(
        template
    )


def _qwen2_vl() -> Any:
    return _qwen("Qwen2VLProcessor", "qwen2_5_vl")


def _qwen2_5_vl() -> Any:
    return _qwen("Qwen2_5_VLProcessor", "qwen2_5_vl")


def _qwen3_vl() -> Any:
    return _qwen("Qwen3VLProcessor", "qwen3_vl")


def _omni() -> Any:
    import transformers

    from mmtune.encoding.processor import without_video

    tokens = {
        "image_token": "<|IMAGE|>",
        "audio_token": "<|AUDIO|>",
        "video_token": "<|VIDEO|>",
        "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
    }
    tokenizer = byte_level(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *tokens.values()],
        tokens,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    template = CHATML.replace("@IMAGE@", "<|vision_bos|><|IMAGE|><|vision_eos|>")
    return without_video(
        transformers.Qwen2_5OmniProcessor,
        {},
        tokenizer=tokenizer,
        image_processor=transformers.Qwen2VLImageProcessor(size={"shortest_edge": 3136, "longest_edge": 47040}),
        feature_extractor=transformers.WhisperFeatureExtractor(),
    ), template.replace("@AUDIO@", "<|audio_bos|><|AUDIO|><|audio_eos|>")


def _qwen2_audio() -> Any:
    import transformers

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    tokenizer = byte_level(tokens, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    processor = transformers.Qwen2AudioProcessor(transformers.WhisperFeatureExtractor(), tokenizer)
    return processor, None


def _flamingo() -> Any:
    import transformers

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<sound>"]
    tokenizer = byte_level(tokens, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    processor = transformers.AudioFlamingo3Processor(transformers.WhisperFeatureExtractor(), tokenizer)
    return processor, CHATML.replace("@AUDIO@", "<sound>")


def _granite() -> Any:
    import transformers

    tokens = ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|audio|>"]
    tokenizer = byte_level(tokens, eos_token="<|end_of_text|>", pad_token="<|end_of_text|>")
    return transformers.GraniteSpeechProcessor(transformers.GraniteSpeechFeatureExtractor(), tokenizer), GRANITE


def _clip(edge: int = 28) -> Any:
    import transformers

    return transformers.CLIPImageProcessor(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge})


def _llava() -> Any:
    import transformers

    tokenizer = sentencepiece(["<s>", "</s>", "<image>", "<pad>"], pad_token="<pad>")
    processor = transformers.LlavaProcessor(
        _clip(), tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return processor, VICUNA


def _llava_bytes() -> Any:
    import transformers

    tokenizer = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"], eos_token="<|im_end|>")
    processor = transformers.LlavaProcessor(
        _clip(), tokenizer, patch_size=7, vision_feature_select_strategy="full", num_additional_image_tokens=0
    )
    return processor, CHATML.replace("@IMAGE@", "<image>")


_PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


def _llava_next() -> Any:
    import transformers

    tokenizer = sentencepiece(["<s>", "</s>", "<image>", "<pad>"], pad_token="<pad>")
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=_PINPOINTS
    )
    processor = transformers.LlavaNextProcessor(
        images, tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return processor, trl_template("llava_next")


def _llava_onevision() -> Any:
    import transformers

    from mmtune.encoding.processor import without_video

    tokenizer = byte_level(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    images = transformers.LlavaOnevisionImageProcessor(
        size={"height": 28, "width": 28}, image_grid_pinpoints=_PINPOINTS
    )
    return without_video(
        transformers.LlavaOnevisionProcessor,
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_3"},
        tokenizer=tokenizer,
        image_processor=images,
    ), CHATML.replace("@IMAGE@", "<image>\n")


def _idefics_tokens() -> list[str]:
    cells = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    return ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<video>", *cells]


def _idefics3() -> Any:
    import transformers

    tokenizer = byte_level(
        ["<|begin_of_text|>", "<|im_start|>", "<|end_of_text|>", *_idefics_tokens()],
        bos_token="<|begin_of_text|>",
        eos_token="<end_of_utterance>",
        pad_token="<|end_of_text|>",
    )
    images = transformers.Idefics3ImageProcessor(size={"longest_edge": 84}, max_image_size={"longest_edge": 28})
    return transformers.Idefics3Processor(images, tokenizer, image_seq_len=4), trl_template("idefics3")


def _smolvlm() -> Any:
    import transformers
    from transformers.models.smolvlm import processing_smolvlm

    from mmtune.encoding.processor import without_video

    if processing_smolvlm.num2words is None:
        # Only videos need it, to write the number of frames as a word.
        processing_smolvlm.num2words = str
    tokenizer = byte_level(
        ["<|im_start|>", "<|im_end|>", *_idefics_tokens()], eos_token="<end_of_utterance>", pad_token="<|im_end|>"
    )
    images = transformers.SmolVLMImageProcessor(size={"longest_edge": 84}, max_image_size={"longest_edge": 28})
    return without_video(
        transformers.SmolVLMProcessor, {"image_seq_len": 4}, tokenizer=tokenizer, image_processor=images
    ), trl_template("smolvlm")


def _internvl() -> Any:
    import transformers

    from mmtune.encoding.processor import without_video

    tokens = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = byte_level(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *tokens.values()],
        tokens,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    images = transformers.GotOcr2ImageProcessor(size={"height": 28, "width": 28}, min_patches=1, max_patches=6)
    return without_video(
        transformers.InternVLProcessor, {"image_seq_length": 4}, tokenizer=tokenizer, image_processor=images
    ), CHATML.replace("@IMAGE@", "<IMG_CONTEXT>\n")


def _gemma3() -> Any:
    import transformers

    tokens = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = sentencepiece(
        ["<s>", "</s>", "<pad>", "<start_of_turn>", "<end_of_turn>", *tokens.values()],
        tokens,
        eos_token="<end_of_turn>",
        pad_token="<pad>",
    )
    tokenizer.add_tokens(["\n\n", "\n\n\n", "<table>"])
    images = transformers.Gemma3ImageProcessor(size={"height": 28, "width": 28})
    return transformers.Gemma3Processor(images, tokenizer, image_seq_length=4), trl_template("gemma3")


def _text(template: str) -> Any:
    def build() -> Any:
        tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>"]
        tokens += ["<|end_header_id|>", "<|eot_id|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
        eos = {"llama3": "<|eot_id|>", "phi3": "<|endoftext|>"}.get(template, "<|im_end|>")
        tokenizer = byte_level(tokens, bos_token="<|begin_of_text|>", eos_token=eos, pad_token="<|endoftext|>")
        tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"])
        tokenizer.add_tokens(["<think>", "</think>"])
        return tokenizer, trl_template(template)

    return build


def _composite(sound: str, queries: int | None = None) -> Any:
    """The project's own model out of parts: one of the sound encoders, the small one beside a CLIP tower and items."""

    def build() -> Any:
        import transformers

        from mmtune.models.composite.processor import CompositeProcessor
        from mmtune.models.log_mel import LogMelFeatureExtractor

        tokenizer = byte_level(
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<audio>", "<behaviour>"],
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
        )
        extractor, convolutions = {
            "log_mel": (LogMelFeatureExtractor(feature_size=16), [[3, 2, 1], [3, 2, 1]]),
            "whisper": (transformers.WhisperFeatureExtractor(chunk_length=10), [[3, 1, 1], [3, 2, 1]]),
            "wav2vec2": (transformers.Wav2Vec2FeatureExtractor(), [[400, 320, 0], [3, 2, 0]]),
        }[sound]
        parts = {"image_processor": _clip() if sound == "log_mel" else None, "feature_extractor": extractor}
        if sound == "log_mel":
            parts |= {"items": [str(item) for item in range(9)], "history_items": 5, "behaviour_tokens": queries}
        facts = {"audio_tokens": queries, "audio_convolutions": convolutions, "reads_prompt": True, "frame_times": True}
        made = CompositeProcessor(tokenizer, **parts, image_tokens=queries or 16, **facts)
        return made, made.chat_template

    return build


_FAMILIES = {
    "qwen2_vl": (_qwen2_vl, {"image"}),
    "qwen2_5_vl": (_qwen2_5_vl, {"image"}),
    "qwen3_vl": (_qwen3_vl, {"image"}),
    "qwen2_5_omni": (_omni, {"image", "audio"}),
    "qwen2_audio": (_qwen2_audio, {"audio"}),
    "audio_flamingo3": (_flamingo, {"audio"}),
    "granite_speech": (_granite, {"audio"}),
    "llava": (_llava, {"image"}),
    "llava_bytes": (_llava_bytes, {"image"}),
    "llava_next": (_llava_next, {"image"}),
    "llava_onevision": (_llava_onevision, {"image"}),
    "idefics3": (_idefics3, {"image"}),
    "smolvlm": (_smolvlm, {"image"}),
    "internvl": (_internvl, {"image"}),
    "gemma3": (_gemma3, {"image"}),
    "composite": (_composite("log_mel"), {"image", "audio", "behaviour"}),
    "composite_queries": (_composite("log_mel", 4), {"image", "audio", "behaviour"}),
    "composite_whisper": (_composite("whisper"), {"audio"}),
    "composite_wav2vec2": (_composite("wav2vec2"), {"audio"}),
    "text_qwen3": (_text("qwen3"), set()),
    "text_qwen2_5": (_text("qwen2_5"), set()),
    "text_llama3": (_text("llama3"), set()),
    "text_phi3": (_text("phi3"), set()),
}
IMAGE_FAMILIES = [name for name, (_, takes) in _FAMILIES.items() if "image" in takes]
AUDIO_FAMILIES = [name for name, (_, takes) in _FAMILIES.items() if "audio" in takes]


@cache
def family(name: str) -> SimpleNamespace:
    """Returns ``processor``, ``renderer`` and ``takes`` of a family; built once."""
    from mmtune.encoding.render import Renderer

    build, takes = _FAMILIES[name]
    try:
        processor, template = build()
    except ImportError as error:
        pytest.skip(f"{name}: {str(error).splitlines()[0]}")
    if template is not None:
        processor.chat_template = template
    return SimpleNamespace(name=name, processor=processor, renderer=Renderer(processor), takes=takes)


def pytest_generate_tests(metafunc: Any) -> None:
    if "any_family" in metafunc.fixturenames:
        metafunc.parametrize("any_family", list(_FAMILIES), indirect=True)
    if "image_family" in metafunc.fixturenames:
        metafunc.parametrize("image_family", IMAGE_FAMILIES, indirect=True)
    if "audio_family" in metafunc.fixturenames:
        metafunc.parametrize("audio_family", AUDIO_FAMILIES, indirect=True)


@pytest.fixture
def any_family(request: Any) -> SimpleNamespace:
    return family(request.param)


image_family = audio_family = any_family


@pytest.fixture(scope="session")
def family_of() -> Any:
    return family


class _Media:
    """Media of fixed sizes, as records and as what transformers wants."""

    def image(self, width: int, height: int) -> tuple[Any, Any]:
        from PIL import Image

        from mmtune.records import Medium

        noise = np.random.default_rng(width * 1009 + height).integers(0, 255, (height, width, 3), dtype=np.uint8)
        medium = Medium("image", f"{width}x{height}.png", width=width, height=height, frames=1)
        return medium, {"type": "image", "image": Image.fromarray(noise)}

    def audio(self, samples: int, rate_hz: int = 16_000) -> tuple[Any, Any]:
        from mmtune.records import Medium

        sound = np.random.default_rng(samples).standard_normal(samples).astype(np.float32) * 0.1
        medium = Medium("audio", f"{samples}.wav", frames=samples, sample_rate_hz=rate_hz, seconds=samples / rate_hz)
        return medium, {"type": "audio", "audio": sound}

    def of(self, kind: str, number: int = 0) -> tuple[Any, Any]:
        """A medium of a kind; each number has another size."""
        from mmtune.records import history

        if kind == "behaviour":
            # The item 12 is not known, and five are read.
            items = ["3", "12", "8", "0", "5", "4", "1"][: 2 * number + 1]
            return history(items), {"type": "behaviour", "behaviour": items}
        return self.audio(9_000 + 1_600 * number) if kind == "audio" else self.image(60 + 40 * number, 44)


@pytest.fixture(scope="session")
def media() -> _Media:
    return _Media()
