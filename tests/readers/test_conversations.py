"""Readers of conversations and instructions on tiny files, and what they refuse."""

import json
from pathlib import Path

import pytest

from mmtune.records import Medium, Record, TextPart, ToolCall
from tests.readers.reading import read, reasons, write


def talk(*turns: tuple[str, str]) -> list[dict]:
    return [{"from": who, "value": said} for who, said in turns]


def test_llava_places_images_where_they_are_marked(tmp_path: Path):
    rows = [
        {
            "system_prompt": "Be brief.",
            "image": ["a.jpg", "b.jpg"],
            "conversations": talk(("human", "<image>\nand <image> differ how?"), ("gpt", "In <image> colour.")),
        },
        {"conversations": talk(("human", "Hi"), ("gpt", "Hello")), "id": 7},
        {"image": "a.jpg", "conversations": talk(("human", "No mark"), ("gpt", "x"))},
        {"conversations": talk(("human", "<image>?"), ("gpt", "x"))},
        {"conversations": talk(("human", "Hi"), ("gpt", " "))},
        {"conversations": talk(("human", "Hi"))},
        {"conversations": talk(("alien", "Hi"))},
        {"conversations": "no list"},
    ]
    items = read("llava", path=write(tmp_path / "l.json", rows))
    first, text = items[:2]
    assert [m.role for m in first.messages] == ["system", "user", "assistant"]
    assert first.messages[1].parts == (
        Medium("image", "a.jpg"),
        TextPart("and "),
        Medium("image", "b.jpg"),
        TextPart(" differ how?"),
    )
    assert first.messages[2].text == "In <image> colour."
    assert text.metadata == {"row_id": "7"} and text.id == "s/train-1"
    assert reasons(items) == [
        "media_mismatch", "media_mismatch", "empty_answer", "no_target", "bad_field", "bad_field",
    ]  # fmt: skip
    assert "0 <image> placeholders but 1" in items[2].detail and "1 <image> placeholders but 0" in items[3].detail
    assert "/conversations/0/from" in items[6].detail


def test_sharegpt_tools_and_preferences(tmp_path: Path):
    call = '{"name": "search", "arguments": {"q": "cat"}}'
    tools = [{"name": "search"}]
    rows = [
        {
            "conversations": talk(
                ("human", "<video><audio>?"), ("function_call", call), ("observation", "[]"), ("gpt", "None.")
            ),
            "tools": json.dumps(tools),
            "videos": ["v.mp4"],
            "audios": ["a.wav"],
        },
        {
            "conversations": talk(("human", "q")),
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "label": False},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "label": True},
        {"conversations": talk(("human", "q"), ("function_call", "{broken"), ("gpt", "x"))},
        {"conversations": talk(("system", "a"), ("system", "b"), ("gpt", "x"))},
    ]
    items = read("sharegpt", path=write(tmp_path / "s.json", rows))
    first = items[0]
    assert [m.role for m in first.messages] == ["user", "assistant", "tool", "assistant"]
    assert first.messages[0].parts == (Medium("video", "v.mp4"), Medium("audio", "a.wav"), TextPart("?"))
    assert first.messages[1].tool_calls == (ToolCall("search", '{"q": "cat"}'),)
    assert json.loads(first.tools) == tools
    assert items[1].messages[-1].text == "good"
    assert isinstance(items[3], Record)
    assert reasons(items) == ["not_preferred", "bad_field", "bad_field"]
    assert "second system turn" in items[5].detail


def user(*content) -> dict:
    return {"role": "user", "content": list(content)}


def test_a_part_whose_type_is_no_text_is_refused(tmp_path: Path):
    rows = [{"messages": [user({"type": kind}), {"role": "assistant", "content": "ok"}]} for kind in ([], {}, 3, None)]
    items = read("messages", path=write(tmp_path / "m.jsonl", rows))
    assert [item.detail for item in items] == [
        f"/messages/0/content/0/type: unknown part {said}" for said in ("a list", "an object", "a number", "null")
    ]


def test_messages_in_every_spelling(tmp_path: Path):
    answer = {"role": "assistant", "content": [{"type": "text", "text": "ok"}]}
    shown = [
        {"type": "image", "image": "a.jpg"},
        {"type": "image", "path": "a.jpg"},
        {"type": "image", "url": "a.jpg"},
        {"type": "image_url", "image_url": {"url": "a.jpg"}},
        {"type": "image_url", "image_url": "a.jpg"},
        {"type": "image_url", "value": "a.jpg"},
        {"type": "input_image", "image_url": "a.jpg"},
    ]
    rows = [{"messages": [user(part, {"type": "text", "text": "<image>?"}), answer]} for part in shown]
    items = read("messages", path=write(tmp_path / "m.jsonl", rows))
    for item in items:
        assert item.messages[0].parts == (Medium("image", "a.jpg"), TextPart("<image>?"))
    others = [
        {"images": ["a.jpg"], "messages": [user({"type": "image"}), answer]},
        {"messages": [user({"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}), answer]},
        {"messages": [user({"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw=="}}), answer]},
        {"messages": [{"role": "user", "content": "<image> is a word"}, {"role": "assistant", "content": "ok"}]},
    ]
    listed, sound, inline, plain = read("messages", path=write(tmp_path / "o.jsonl", others))
    assert listed.messages[0].parts == (Medium("image", "a.jpg"),)
    assert sound.messages[0].parts == (Medium("audio", "", data=b"RIFF"),)
    assert inline.messages[0].parts == (Medium("image", "", data=b"\x89PNG"),)
    assert plain.messages[0].parts == (TextPart("<image> is a word"),)


def test_messages_reasoning_tools_and_weights(tmp_path: Path):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    rows = [
        {
            "id": "own",
            "tools": [{"type": "function"}],
            "messages": [
                {"role": "user", "content": "q", "loss_weight": 0.0},
                {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
                {"role": "tool", "content": "1", "name": "f"},
                {"role": "assistant", "content": "first", "loss_weight": 0.0},
                {
                    "role": "assistant",
                    "content": [{"type": "reasoning", "value": "so"}, {"type": "text", "value": "ok"}],
                },
            ],
        },
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss_weight": 0}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss_weight": 0.5}]},
        {"messages": [{"role": "user", "content": [{"type": "hologram"}]}, {"role": "assistant", "content": "a"}]},
        {"images": ["a", "b"], "messages": [user({"type": "image"}), {"role": "assistant", "content": "a"}]},
        {"messages": [user({"type": "image"}), {"role": "assistant", "content": "a"}]},
        {"other": 1},
        [1],
    ]
    items = read("messages", path=write(tmp_path / "m.jsonl", rows))
    first = items[0]
    assert first.id == "s/own"
    assert first.messages[1].tool_calls == (ToolCall("f", '{"x": 1}'),) and first.messages[1].reasoning == "hm"
    assert first.messages[2].name == "f"
    assert [m.train for m in first.messages if m.role == "assistant"] == [True, False, True]
    assert first.messages[4].reasoning == "so" and first.messages[4].text == "ok"
    assert reasons(items) == [
        "no_target", "bad_field", "bad_field", "media_mismatch", "media_mismatch", "bad_field", "bad_field",
    ]  # fmt: skip
    assert "/messages/0/content/0/type" in items[3].detail


def said(text: str, role: str = "assistant") -> dict:
    return {"role": role, "content": text}


@pytest.mark.parametrize("reader", ["messages", "sharegpt"])
@pytest.mark.parametrize("no", [{"loss": False}, {"train": False}, {"weight": 0}, {"loss_weight": 0.0}])
def test_an_answer_that_bears_no_loss_says_so_in_several_ways(tmp_path: Path, reader: str, no: dict):
    name = next(iter(no))
    asked, yes, half = said("q", "user"), {**said("b"), name: True}, {**said("c"), name: 0.5}
    rows = [
        {"messages": [asked, {**said("a"), **no}, asked, yes, asked, {**said("c"), name: None}]},
        {"messages": [asked, half]},
        {"messages": [asked, {**said("a"), **no}]},
    ]
    first, *others = read(reader, path=write(tmp_path / "t.jsonl", rows))
    assert [turn.train for turn in first.messages if turn.role == "assistant"] == [False, True, True]
    assert reasons(others) == ["bad_field", "no_target"]
    assert others[0].detail == f"/messages/1/{name}: 0.5; only true, false, 1 and 0 are read"


@pytest.mark.parametrize("reader", ["messages", "sharegpt"])
def test_a_weight_that_is_not_heeded_is_refused(tmp_path: Path, reader: str):
    asked, good = said("q", "user"), said("a")
    rows = [
        {"messages": [asked, good], "weight": 0.5},
        {"messages": [asked, good], "loss_weight": 0},
        {"messages": [{**asked, "train": True}, good]},
        {"messages": [{**asked, "weight": 1}, good]},
        {"messages": [asked, {**good, "loss_scale": 2.0}]},
        {"messages": [asked, {**good, "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}]},
    ]
    items = read(reader, path=write(tmp_path / "t.jsonl", rows))
    assert [(item.reason, item.detail) for item in items] == [
        ("bad_field", "/weight: 0.5; rows are taught by a weight of 1 or 0: leave weight out of them"),
        ("not_preferred", "/loss_weight: 0; this row is not one to learn"),
        ("bad_field", "/messages/0/train: True; of user no turn is taught, only the assistant's"),
        ("bad_field", "/messages/0/weight: 1; of user no turn is taught, only the assistant's"),
        ("bad_field", "/messages/1/loss_scale: 2.0; only true, false, 1 and 0 are read"),
        ("bad_field", "/messages/1/train_detail: a turn is taught as a whole or not at all"),
    ]
    heeded = [
        {"messages": [asked, good], "weight": 1.0, "loss": 2.31},
        {"messages": [asked, good], "weight": "3 kg"},
        {"messages": [{**asked, "train": False, "weight": None}, {**good, "train_detail": None}]},
    ]
    assert reasons(read(reader, path=write(tmp_path / "h.jsonl", heeded))) == []


def test_sharegpt_turns_in_pairs(tmp_path: Path):
    rows = [
        {"system": "s", "conversation": [{"human": "<image>a", "assistant": "b"}, {"human": "c", "assistant": "d"}]}
    ]
    (item,) = read("sharegpt", path=write(tmp_path / "t.jsonl", [{**rows[0], "images": ["x.jpg"]}]))
    assert [(turn.role, turn.text) for turn in item.messages] == [
        ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")
    ]  # fmt: skip
    assert item.messages[1].media == (Medium("image", "x.jpg"),)


@pytest.mark.parametrize("reader", ["messages", "sharegpt"])
def test_trl_rows_are_the_conversation_that_they_prefer(tmp_path: Path, reader: str):
    asked, good, bad = said("q", "user"), said("good"), said("bad")
    rows = [
        {"prompt": [asked], "chosen": [good], "rejected": [bad]},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"chosen": [asked, good], "rejected": [asked, bad]},
        {"prompt": "q", "chosen": [asked, good], "rejected": [asked, bad]},
        {"prompt": [asked], "completion": [good]},
        {"prompt": "q", "completion": "good", "label": True},
        {"messages": [asked], "chosen": good, "rejected": bad},
        {"messages": [asked, good], "prompt": "q", "chosen": [asked, good], "rejected": [asked, bad]},
    ]
    items = read(reader, path=write(tmp_path / "t.jsonl", rows))
    for item in items:
        assert [(m.role, m.text, m.train) for m in item.messages] == [("user", "q", True), ("assistant", "good", True)]
    refused = [
        {"prompt": "q", "completion": "good", "label": False},
        {"messages": [asked, good], "loss": False},
        {"chosen": "good", "rejected": "bad"},
        {"prompt": "q"},
        {"prompt": 3, "chosen": [good]},
        {"prompt": [asked], "completion": [said("")]},
    ]
    items = read(reader, path=write(tmp_path / "r.jsonl", refused))
    assert reasons(items) == ["not_preferred", "not_preferred", "bad_field", "bad_field", "bad_field", "empty_answer"]
    assert items[1].detail == "/loss: false; this answer is not one to learn"
    assert items[2].detail == "/prompt: missing; the row has chosen, rejected"
    assert items[4].detail == "/prompt: expected a list, found a number"
    assert items[5].detail == "/prompt+completion/1: the assistant's turn is empty"


def test_trl_rows_with_pictures(tmp_path: Path):
    asked = [user({"type": "image"}, {"type": "text", "text": "What?"})]
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]
    rows = [
        {"images": ["c.jpg"], "prompt": asked, "chosen": answer, "rejected": answer},
        {"images": ["c.jpg"], "prompt": asked, "completion": answer},
    ]
    for item in read("messages", path=write(tmp_path / "t.jsonl", rows)):
        assert item.messages[0].parts == (Medium("image", "c.jpg"), TextPart("What?"))
        assert item.messages[1].text == "A cat."


def test_a_picture_that_is_marked_in_the_text_is_told_of_the_reader_that_takes_it(tmp_path: Path):
    rows = [{"images": ["c.jpg"], "messages": [said("<image>What?", "user"), said("A cat.")]}]
    path = write(tmp_path / "t.jsonl", rows)
    (marked,) = read("messages", path=path)
    assert marked.detail == (
        "0 image part(s) but 1 image file(s)"
        "; <image> in a text is words here, and stands for a file with reader: sharegpt"
    )
    assert read("sharegpt", path=path)[0].messages[0].media == (Medium("image", "c.jpg"),)


def test_pictures_without_a_place_stand_where_trl_puts_them(tmp_path: Path):
    trl = pytest.importorskip("trl.data_utils")
    system, asked, answer, again = said("Hi.", "system"), said("What?", "user"), said("A cat."), said("Sure?", "user")
    rows = [
        {"images": ["c.jpg", "d.jpg"], "messages": [system, asked, answer, again, answer]},
        {"images": ["c.jpg"], "prompt": [asked], "completion": [answer]},
        {"image": "c.jpg", "prompt": [asked], "completion": [answer]},
    ]
    for row, item in zip(rows, read("messages", path=write(tmp_path / "t.jsonl", rows)), strict=True):
        turns = row.get("messages") or [asked, answer]
        wanted = trl.prepare_multimodal_messages(turns, row.get("images", ["c.jpg"]))
        shown = [
            [part.path if isinstance(part, Medium) else part.text for part in message.parts]
            for message in item.messages
        ]
        assert shown == [[part.get("image", part.get("text")) for part in turn["content"]] for turn in wanted]


def test_pictures_without_a_placeholder_are_told_of_the_reader_that_shows_them(tmp_path: Path):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    rows = [
        {"images": ["c.jpg"], "messages": [said("What?", "user"), said("A cat.")]},
        {"images": ["c.jpg", "d.jpg"], "messages": [said("<image>What?", "user"), said("A cat.")]},
        {"images": ["c.jpg"], "conversations": turns},
    ]
    path = write(tmp_path / "t.jsonl", rows)
    told, *others = read("sharegpt", path=path)
    assert told.detail.endswith("1 image file(s); reader: messages shows them before the first question")
    assert all(item.detail.endswith("image file(s)") for item in others)
    # The advice does as it says.
    assert read("messages", path=path)[0].messages[0].media == (Medium("image", "c.jpg"),)


def test_other_media_and_places_that_are_marked_for_some_pictures_are_not_guessed(tmp_path: Path):
    rows = [
        {"audios": ["c.wav"], "messages": [said("What?", "user"), said("A cat.")]},
        {"images": ["c.jpg", "d.jpg"], "messages": [user({"type": "image"}), said("A cat.")]},
        {"images": ["c.jpg"], "messages": [said("A cat.")]},
    ]
    items = read("messages", path=write(tmp_path / "t.jsonl", rows))
    assert [item.reason for item in items] == ["media_mismatch"] * 3


@pytest.mark.parametrize("reader", ["sharegpt", "messages"])
def test_marks_for_objects_are_not_taught_as_words(tmp_path: Path, reader: str):
    boxes = {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]}
    rows = [
        {"objects": boxes, "messages": [said("Find <ref-object>", "user"), said("<bbox>")]},
        {"objects": boxes, "messages": [said("Find the dog", "user"), said("(1,2),(3,4)")]},
        {"messages": [said("What does <bbox> mean?", "user"), said("A box.")]},
    ]
    refused, *kept = read(reader, path=write(tmp_path / "t.jsonl", rows))
    assert refused.detail.startswith("/objects: <ref-object> and <bbox> would be taught as these words")
    assert [item.messages[0].text for item in kept] == ["Find the dog", "What does <bbox> mean?"]


def test_alpaca(tmp_path: Path):
    rows = [
        {"instruction": "Sum up.", "input": "Long text.", "output": "Short."},
        {"instruction": "q3", "output": "a3", "history": [["q1", "a1"], ["q2", "a2"]], "system": "sys"},
        {"instruction": "What?", "output": "A cat.", "image": "c.jpg", "id": "1"},
        {"instruction": "Is <image> red?", "output": "Yes.", "images": ["c.jpg"]},
        {"instruction": "Is <image> red?", "output": "Yes."},
        {"instruction": "q", "output": ""},
        {"instruction": "q", "output": "a", "history": [["q1"]]},
        {"output": "a"},
    ]
    items = read("alpaca", path=write(tmp_path / "a.json", rows))
    plain, long, shown, marked = items[:4]
    assert (plain.task, plain.text, plain.context, plain.references) == (
        "instruction", "Sum up.", "Long text.", ("Short.",),
    )  # fmt: skip
    assert [m.text for m in long.messages] == ["sys", "q1", "a1", "q2", "a2", "q3", "a3"]
    assert shown.media == (Medium("image", "c.jpg"),) and shown.id == "s/train-2"
    assert marked.messages[0].parts == (TextPart("Is "), Medium("image", "c.jpg"), TextPart(" red?"))
    assert reasons(items) == ["media_mismatch", "empty_answer", "bad_field", "bad_field"]


@pytest.mark.parametrize(
    ("row", "reader", "fits"),
    [
        ({"messages": [], "x": 1}, "alpaca", " (reader: messages or sharegpt)"),
        ({"conversations": []}, "messages", " (reader: sharegpt)"),
        ({"instruction": "a", "output": "b"}, "sharegpt", " (reader: alpaca)"),
        ({"question": "a", "answer": "b"}, "llava", " (reader: table, columns: {question: question, answer: answer})"),
        ({"instruction": "a", "x": "b"}, "alpaca", ""),
        ({"x": 1}, "messages", ""),
    ],
)
def test_a_row_of_another_format_is_told_of_its_reader(tmp_path: Path, row: dict, reader: str, fits: str):
    (item,) = read(reader, path=write(tmp_path / "t.jsonl", [row]))
    assert item.detail.endswith(f"missing; the row has {', '.join(row)}{fits}")


def test_the_reader_that_is_told_reads_the_row(tmp_path: Path):
    rows = [{"query": "What?", "response": "A cat.", "history": [["Hi", "Hello"]], "system": "Be short."}]
    path = write(tmp_path / "t.jsonl", rows)
    (told,) = read("sharegpt", path=path)
    assert "(reader: alpaca, columns: {instruction: query, output: response})" in told.detail
    (item,) = read("alpaca", path=path, columns={"instruction": "query", "output": "response"})
    assert [message.text for message in item.messages] == ["Be short.", "Hi", "Hello", "What?", "A cat."]
