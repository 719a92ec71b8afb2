"""User text never becomes a control or media token, whatever it spells and however it is split."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmtune.encoding.refused import Refused
from mmtune.records import Message, TextPart, ToolCall

HOSTILE = [
    "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|endoftext|>", "<image>", "</s>", "<s>",
    "<|AUDIO|>", "<|audio_bos|>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<image_soft_token>",
    "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<row_1_col_1>", "<IMG_CONTEXT>", "<img>",
    "<tool_call>", "</tool_call>", "<think>", "</think>", "<|eot_id|>", "<|user|>", "<pad>", "[INST]", "<unk>",
]  # fmt: skip
FRAGMENTS = sorted({text[:cut] for text in HOSTILE for cut in (1, 3, 5)} | {text[-4:] for text in HOSTILE})
PIECES = st.sampled_from([*HOSTILE, *FRAGMENTS, " ", "\n", "a", "é", "猫", "assistant\n", '"', "\\"])
TEXTS = st.lists(PIECES, min_size=1, max_size=7).map("".join)


def controls(family: Any, ids: Any) -> Counter[int]:
    """Counts every control id of a row."""
    tokenizer = getattr(family.processor, "tokenizer", family.processor)
    known = {token.id for token in family.renderer.control.by_text.values()} - {tokenizer.unk_token_id}
    return Counter(index for index in ids.tolist() if index in known)


def build(family: Any, media: Any, first: str, second: str, answer: str) -> list[Message]:
    medium = ()
    if "image" in family.takes:
        medium = (media.image(40, 30)[0],)
    elif "audio" in family.takes:
        medium = (media.audio(8_000)[0],)
    # The question comes together from two parts, so a token may be split over them.
    question = (TextPart(first), TextPart(second))
    return [Message("user", (*medium, *question)), Message("assistant", (TextPart(answer),))]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(first=TEXTS, second=TEXTS, answer=TEXTS)
def test_text_leaves_the_control_ids_as_they_are(
    any_family: Any, media: Any, first: str, second: str, answer: str
) -> None:
    plain = any_family.renderer.encode(build(any_family, media, "some", "words", "fine"))
    try:
        row = any_family.renderer.encode(build(any_family, media, first, second, answer))
    except Refused as refused:
        # Only a vocabulary that itself holds control tokens as entries may turn a text away.
        assert refused.reason == "control_token_in_text"
        assert any_family.name in ("llava", "llava_next", "gemma3")
        return
    found, expected = controls(any_family, row.input_ids), controls(any_family, plain.input_ids)
    if not (first + second).strip() or not answer.strip():
        # Templates may write a turn without text in another way.
        assert not found - expected - expected
    else:
        assert found == expected
    assert len(row.media) == len(plain.media)


def test_byte_level_tokenizers_keep_every_hostile_text(family_of: Any, media: Any) -> None:
    for name in ("qwen2_vl", "llava_bytes", "idefics3", "internvl", "text_qwen3"):
        family = family_of(name)
        tokenizer = getattr(family.processor, "tokenizer", family.processor)
        for text in HOSTILE:
            row = family.renderer.encode(build(family, media, f"a{text[:3]}", f"{text[3:]}b", f"x{text}y"))
            assert f"a{text}b" in tokenizer.decode(row.input_ids.tolist()), (name, text)
            kept = tokenizer.decode(row.labels[row.labels != -100].tolist())
            assert f"x{text}y" in kept, (name, text)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=TEXTS)
def test_tools_calls_and_results_are_text_too(family_of: Any, text: str) -> None:
    import json

    family = family_of("text_qwen2_5")

    def talk(text: str) -> Any:
        tools = json.dumps([{"type": "function", "function": {"name": "look", "description": text}}])
        call = ToolCall("look", json.dumps({"where": text, "count": 2}))
        return family.renderer.encode(
            [
                Message("user", (TextPart("look"),)),
                Message("assistant", (), tool_calls=(call,)),
                Message("tool", (TextPart(text),), name="look"),
                Message("assistant", (TextPart("seen"),)),
            ],
            tools=tools,
        )

    if text.strip():
        assert controls(family, talk(text).input_ids) == controls(family, talk("harmless").input_ids)
