"""A searched prompt put into rows: what is asked, what is kept, and the file that carries it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mmtune.errors import DataError
from mmtune.prompts.searched import (
    SCHEMA,
    SLOTS,
    SearchedPrompt,
    asked_with,
    moved,
    prompt_facts,
    read_prompt,
    slot_names,
)
from mmtune.records import Example, Medium, Message, Part, Reject, TextPart, history

PICTURE = Medium("image", "a.png", width=4, height=4)
OTHER = Medium("image", "b.png", width=4, height=4)


def example(
    *parts: Part, id: str = "r", answer: str = "yes", options: tuple[str, ...] = ("yes", "no"), **metadata: str
) -> Example:
    turns = (Message("user", parts), Message("assistant", (TextPart(answer),)))
    return Example(id, "s", "vqa", "train", turns, (answer,), "accuracy", options, metadata=metadata)


def asked(prompt: SearchedPrompt, row: Example) -> Example:
    made = asked_with(prompt, row)
    assert isinstance(made, Example)
    return made


ROW = example(PICTURE, TextPart("Is it red?"), **{SLOTS: '{"question": "Is it red?", "context": "A car."}'})


@pytest.mark.parametrize(
    ("instruction", "parts"),
    [
        ("{prompt}", (PICTURE, TextPart("Is it red?"))),
        ("Look. {prompt} Say yes.", (PICTURE, TextPart("Look. Is it red? Say yes."))),
        ("See {media} and say: {prompt}", (TextPart("See "), PICTURE, TextPart(" and say: Is it red?"))),
        ("Q: {question} ({options})", (PICTURE, TextPart("Q: Is it red? (yes, no)"))),
        ("{context} {{x}} {question}", (PICTURE, TextPart("A car. {x} Is it red?"))),
        ("{question}\n{options_}", (PICTURE, TextPart("Is it red?\nOPTIONS:\n- yes\n- no"))),
    ],
)
def test_slots_are_filled_and_leading_media_stay_first(instruction: str, parts: tuple[Part, ...]):
    made = asked(SearchedPrompt(instruction), ROW)
    assert made.messages[0].parts == parts and made.messages[1] == ROW.messages[1]
    assert (made.references, made.options, made.exemplar_ids) == (ROW.references, ROW.options, ())


def test_braces_and_media_inside_a_question_are_left_alone():
    row = example(TextPart("{options} before "), PICTURE, TextPart(" after {x}"))
    made = asked(SearchedPrompt("Now: {prompt}!"), row)
    assert made.messages[0].parts == (TextPart("Now: {options} before "), PICTURE, TextPart(" after {x}!"))


def test_a_slot_that_the_row_lacks_is_a_refusal():
    made = asked_with(SearchedPrompt("{question} {prompt}"), example(TextPart("hi")))
    assert isinstance(made, Reject) and (made.reason, "question" in made.detail) == ("missing_field", True)
    assert slot_names(example(TextPart("hi"))) == {"prompt", "options", "options_"}
    assert {"media", "question", "context", "dialogue"} <= slot_names(ROW) and "answer" not in slot_names(ROW)


def test_label_words_stand_wherever_the_labels_stood():
    row = example(TextPart("Fits it? yes, no"), **{SLOTS: '{"question": "Fits it?"}'})
    shown = example(TextPart("And this? yes, no"), id="e", answer="no")
    prompt = SearchedPrompt("{prompt} [{options}]", (shown,), {"yes": "true", "no": "false"})
    made = asked(prompt, row)
    assert [turn.text for turn in made.messages] == [
        "And this? true, false [true, false]",
        "false",
        "Fits it? true, false [true, false]",
        "true",
    ]
    assert (made.references, made.options) == (("true",), ("true", "false"))
    assert [prompt.label_of(text) for text in ("True.", " false", "maybe")] == ["yes", "no", "maybe"]


def test_exemplars_stand_behind_the_system_turn_untrained_and_never_give_the_row_away():
    system = Message("system", (TextPart("Be kind."),))
    row = replace(ROW, messages=(system, *ROW.messages))
    same_picture = example(PICTURE, TextPart("Is it blue?"), id="e1", answer="no")
    itself = replace(ROW, messages=ROW.messages)
    fine = example(OTHER, TextPart("Is it new?"), id="e2", answer="no")
    made = asked(SearchedPrompt("Say: {prompt}", (same_picture, itself, fine)), row)
    assert made.exemplar_ids == ("e2",)
    assert [turn.role for turn in made.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [turn.train for turn in made.messages if turn.role == "assistant"] == [False, True]
    assert made.messages[1].parts == (OTHER, TextPart("Say: Is it new?"))
    twin = example(TextPart("Fits it?"), id="t")
    assert asked(SearchedPrompt("{prompt}", (twin,)), replace(twin, id="u")).exemplar_ids == ()


def test_only_the_last_question_of_a_conversation_changes():
    turns = tuple(Message(role, (TextPart(text),)) for role, text in (("user", "a"), ("assistant", "b"), ("user", "c")))
    made = asked(SearchedPrompt("<{prompt}>"), replace(ROW, messages=turns, metadata={}))
    assert [turn.text for turn in made.messages] == ["a", "b", "<c>"]
    none = asked_with(SearchedPrompt("{prompt}"), replace(ROW, messages=(Message("assistant", (TextPart("x"),)),)))
    assert isinstance(none, Reject) and none.reason == "no_question"


def test_the_content_free_question_is_worded_too():
    row = example(TextPart("good film"), content_free="N/A", **{SLOTS: '{"question": "good film"}'})
    assert asked(SearchedPrompt("Say it: {prompt}"), row).metadata["content_free"] == "Say it: N/A"
    # A slot of the text itself has no content-free form: the row is not calibrated.
    assert "content_free" not in asked(SearchedPrompt("Say it: {question}"), row).metadata


def test_a_prompt_survives_its_file(tmp_path: Path):
    packed = Medium("image", "", data=b"\x00\xff", width=1, height=1)
    shown = (replace(ROW, id="e"), example(packed, id="f"), example(history(("318", "50")), id="g"))
    prompt = SearchedPrompt("Ü {prompt}", shown, {"yes": "ja"})
    path = tmp_path / "prompt.json"
    path.write_text(json.dumps({"schema": SCHEMA, "prompt": prompt_facts(prompt), "media_root": "/m"}))
    assert read_prompt(path) == (prompt, "/m")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"schema": "mmtune.prompt/2"}', '{"schema": "mmtune.prompt/1", "prompt": {"instruction": 3}}'],
)
def test_another_file_is_no_prompt(text: str, tmp_path: Path):
    path = tmp_path / "prompt.json"
    path.write_text(text)
    with pytest.raises(DataError, match="is no searched prompt"):
        read_prompt(path)
    with pytest.raises(DataError):
        read_prompt(tmp_path / "absent.json")


def test_media_of_exemplars_move_with_the_media_root():
    prompt = SearchedPrompt("{prompt}", (example(PICTURE),))
    assert moved(prompt, "/data/x", "/data").exemplars[0].media[0].path == "x/a.png"
    with pytest.raises(DataError, match="not below /other"):
        moved(prompt, "/data/x", "/other")
