"""Reasoning, tools, refusals and notes of rendering."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mmtune.encoding.refused import Refused
from mmtune.encoding.render import Renderer
from mmtune.encoding.turns import without_first_turn
from mmtune.errors import RecipeError
from mmtune.records import Medium, Message, TextPart, ToolCall


def user(text: str) -> Message:
    return Message("user", (TextPart(text),))


def assistant(text: str, **more: Any) -> Message:
    return Message("assistant", (TextPart(text),) if text else (), **more)


def learned(family: Any, row: Any) -> str:
    return family.processor.decode(row.labels[row.labels != -100].tolist())


def test_reasoning_equals_the_template_and_is_learned(family_of: Any) -> None:
    family = family_of("text_qwen3")
    messages = [user("How many?"), assistant("three", reasoning="one, two, three")]
    plain = [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "three", "reasoning_content": "one, two, three"},
    ]
    row = family.renderer.encode(messages)
    assert row.input_ids.tolist() == family.processor.apply_chat_template(plain, tokenize=True)["input_ids"]
    assert learned(family, row) == "<think>\none, two, three\n</think>\n\nthree<|im_end|>"


def test_dropped_reasoning_has_no_place(family_of: Any) -> None:
    family = family_of("text_qwen3")
    messages = [user("a"), assistant("b", reasoning="old thought"), user("c"), assistant("d", reasoning="new")]
    plain = [{"role": m.role, "content": m.text, "reasoning_content": m.reasoning or None} for m in messages]
    row = family.renderer.encode(messages)
    assert row.input_ids.tolist() == family.processor.apply_chat_template(plain, tokenize=True)["input_ids"]
    assert "old thought" not in family.processor.decode(row.input_ids.tolist())
    assert learned(family, row) == "b<|im_end|><think>\nnew\n</think>\n\nd<|im_end|>"


@pytest.mark.parametrize("name", ["text_qwen2_5", "text_qwen3"])
def test_tools_equal_the_template(family_of: Any, name: str) -> None:
    family = family_of(name)
    tools = [
        {
            "type": "function",
            "function": {
                "name": "search",
                "description": 'Finds "things", café\nand more',
                "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
            },
        }
    ]
    arguments = {"query": 'a "quoted" é\n', "top": 3, "deep": {"x": [1, "two"]}}
    messages = [
        user("find it"),
        assistant("", tool_calls=(ToolCall("search", json.dumps(arguments)),)),
        Message("tool", (TextPart('{"found": "é"}'),), name="search"),
        assistant("It is é."),
    ]
    plain: list[dict[str, Any]] = [{"role": m.role, "content": m.text} for m in messages]
    plain[1]["tool_calls"] = [{"type": "function", "function": {"name": "search", "arguments": arguments}}]
    row = family.renderer.encode(messages, tools=json.dumps(tools))
    expected = family.processor.apply_chat_template(plain, tools=tools, tokenize=True)["input_ids"]
    assert row.input_ids.tolist() == expected
    text = learned(family, row)
    assert text.count("<|im_end|>") == 2 and "</tool_call><|im_end|>" in text and "It is é.<|im_end|>" in text
    assert "found" not in text


def test_a_template_that_hides_or_doubles_text_is_refused(family_of: Any) -> None:
    import copy

    for template in (
        "{% for m in messages %}{{ m.content[:2] }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{{ raise_exception('no') }}",
    ):
        processor = copy.copy(family_of("text_qwen3").processor)
        processor.chat_template = template
        with pytest.raises(Refused, match="template_refused"):
            Renderer(processor).encode([user("hello"), assistant("there")])


def test_an_endless_template_stops(family_of: Any, monkeypatch: Any) -> None:
    import copy

    from mmtune.encoding import skeleton

    monkeypatch.setattr(skeleton, "_SECONDS", 0.3)
    processor = copy.copy(family_of("text_qwen3").processor)
    processor.chat_template = (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
        "{% endfor %}{{ messages[0].content }}"
    )
    with pytest.raises(RecipeError, match="does not end"):
        Renderer(processor).encode([user("hello"), assistant("there")])


def test_a_model_without_template_is_named(family_of: Any) -> None:
    import copy

    processor = copy.copy(family_of("text_qwen3").processor)
    processor.chat_template = None
    with pytest.raises(RecipeError, match="no chat template"):
        Renderer(processor)


def test_a_video_is_shown_as_frames(family_of: Any) -> None:
    family = family_of("qwen2_vl")
    video = Medium("video", "v.mp4", width=64, height=48, frames=30, fps=10.0, seconds=3.0)
    renderer = Renderer(family.processor, video_frames=4)
    row = renderer.encode([Message("user", (video, TextPart("what happens?"))), assistant("a cat")])
    assert [(span.medium.path, span.frame, span.frames) for span in row.media] == [("v.mp4", i, 4) for i in range(4)]
    pad = family.processor.image_token_id
    for span in row.media:
        assert (row.input_ids[span.start : span.start + span.length] == pad).all()
    assert (row.input_ids == pad).sum() == sum(span.length for span in row.media)


def test_early_turns_go_first() -> None:
    messages = [Message("system", ()), user("1"), assistant("a"), user("2"), assistant("b"), user("3"), assistant("c")]
    once = without_first_turn(messages)
    assert once is not None and [m.text for m in once] == ["", "2", "b", "3", "c"]
    twice = without_first_turn(once)
    assert twice is not None and [m.text for m in twice] == ["", "3", "c"]
    assert without_first_turn(twice) is None
