"""The oracle: ids equal the family's own apply_chat_template on the same conversation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mmtune.records import Message, TextPart

# Role, then texts and the letter of a medium: I an image, A a sound, each medium of its own size.
CONVERSATIONS = {
    "one question": [("user", ["M", "What colour is the cat?"]), ("assistant", ["It is black."])],
    "text only": [("user", ["hello world"]), ("assistant", ["Hello! How are you?"])],
    "system": [
        ("system", ["You are a helpful assistant."]),
        ("user", ["M", "How many digits?"]),
        ("assistant", ["three"]),
    ],
    "two turns": [
        ("user", ["M", "How many?"]),
        ("assistant", ["3"]),
        ("user", ["And on the left?"]),
        ("assistant", ["There are 2, I think."]),
    ],
    "two media": [("user", ["M", "M", "same or different?"]), ("assistant", ["different"])],
    "media between texts": [("user", ["First ", "M", " then ", "M", " which?"]), ("assistant", ["the first"])],
    "media in both turns": [
        ("user", ["M", "this?"]),
        ("assistant", ["yes"]),
        ("user", ["M", "and this?"]),
        ("assistant", ["no"]),
    ],
    "white space edges": [("user", ["M", "  padded \n question\n"]), ("assistant", [" padded answer \n"])],
    "unicode": [("user", ["M", "Où est l'été? 猫はどこ 🐈‍⬛ e\u0301"]), ("assistant", ["là-bas — 🐈 naïve ﬁ"])],
    "line breaks": [("user", ["a\n\nb\r\n\tc", "M"]), ("assistant", ["x\n\n\ny  z"])],
}


def conversation(family: Any, media: Any, turns: Any) -> tuple[list[Message], list[dict[str, Any]]] | None:
    """Returns the conversation as messages and as transformers takes it; None if it has unfit media."""
    sizes = iter([(60, 40), (33, 90), (28, 28)])
    lengths = iter([16_000, 9_001, 40_000])
    messages, plain = [], []
    for role, contents in turns:
        parts: list[Any] = []
        shown: list[Any] = []
        for content in contents:
            if content != "M":
                medium, real = TextPart(content), {"type": "text", "text": content}
            elif "image" in family.takes:
                medium, real = media.image(*next(sizes))
            elif "audio" in family.takes:
                medium, real = media.audio(next(lengths))
            else:
                continue
            parts.append(medium)
            shown.append(real)
        messages.append(Message(role, tuple(parts)))
        plain.append({"role": role, "content": shown if family.takes else "".join(p["text"] for p in shown)})
    return messages, plain


def reference(family: Any, plain: list[dict[str, Any]], **options: Any) -> list[int]:
    write = type(family.processor).apply_chat_template
    if family.name == "smolvlm":
        # Its own method only adds video defaults, taken from the video part that is left out here.
        from transformers import ProcessorMixin

        write = ProcessorMixin.apply_chat_template
    try:
        made = write(family.processor, plain, tokenize=True, return_dict=True, **options)["input_ids"]
    except ValueError as error:
        if "must match 1:1" in str(error):
            pytest.skip(f"{family.name} takes one sound per conversation")
        raise
    return list(np.asarray(made).reshape(-1))


@pytest.mark.parametrize("name", list(CONVERSATIONS))
def test_ids_equal_the_familys_own_rendering(any_family: Any, media: Any, name: str) -> None:
    messages, plain = conversation(any_family, media, CONVERSATIONS[name])
    row = any_family.renderer.encode(messages)
    assert row.input_ids.tolist() == reference(any_family, plain)


@pytest.mark.parametrize("name", ["one question", "two turns", "system"])
def test_a_prompt_equals_the_rendering_with_generation_prompt(any_family: Any, media: Any, name: str) -> None:
    messages, plain = conversation(any_family, media, CONVERSATIONS[name][:-1])
    row = any_family.renderer.encode(messages, add_generation_prompt=True)
    assert row.input_ids.tolist() == reference(any_family, plain, add_generation_prompt=True)
    if len(messages) < 3:
        assert (row.labels == -100).all()


@pytest.mark.parametrize("name", ["one question", "two turns", "media in both turns", "unicode"])
def test_labels_are_the_answers_and_their_end(any_family: Any, media: Any, name: str) -> None:
    messages, _ = conversation(any_family, media, CONVERSATIONS[name])
    row = any_family.renderer.encode(messages)
    tokenizer = getattr(any_family.processor, "tokenizer", any_family.processor)
    bears = row.labels != -100
    assert (row.labels[bears] == row.input_ids[bears]).all()
    edges = np.flatnonzero(np.diff(np.r_[0, bears.astype(int), 0]))
    runs = [row.labels[a:b].tolist() for a, b in zip(edges[::2], edges[1::2], strict=True)]
    answers = [message.text for message in messages if message.role == "assistant"]
    assert len(runs) == len(answers)
    for run, answer in zip(runs, answers, strict=True):
        end = tokenizer.convert_ids_to_tokens(run[-1])
        assert end in ("<|im_end|>", "</s>", "<end_of_turn>", "<end_of_utterance>", "<|eot_id|>", "<|end|>",
                       "<|end_of_text|>", "<|endoftext|>"), end  # fmt: skip
        said = tokenizer.decode(run, skip_special_tokens=True).replace("<think>\n\n</think>\n\n", "").strip()
        expected = tokenizer.decode(tokenizer.encode(answer, add_special_tokens=False), skip_special_tokens=True)
        assert said == expected.strip()


def test_an_untrained_turn_bears_no_loss(any_family: Any, media: Any) -> None:
    messages, _ = conversation(any_family, media, CONVERSATIONS["two turns"])
    from dataclasses import replace

    both = any_family.renderer.encode(messages)
    messages[1] = replace(messages[1], train=False)
    last = any_family.renderer.encode(messages)
    assert last.input_ids.tolist() == both.input_ids.tolist()
    changed = np.flatnonzero(both.labels != last.labels)
    assert changed.size and (last.labels[changed] == -100).all()
    assert changed.max() < np.flatnonzero(last.labels != -100).min()
