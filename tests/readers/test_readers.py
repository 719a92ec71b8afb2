"""Each reader on a tiny file in the official layout, and what it refuses."""

import csv
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from mmtune.errors import CapabilityError, DataError, RecipeError
from mmtune.readers import READERS, find_reader
from mmtune.readers.coco_instances import plural
from mmtune.readers.limit import cut, take
from mmtune.readers.repeated import SeenIds, drop_repeated
from mmtune.readers.source import SourceFiles
from mmtune.records import Medium, Record, Reject, TextPart, ToolCall


def write(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in value))
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def read(reader: str, split: str = "train", **fields) -> list:
    return list(find_reader(reader)(SourceFiles(id="s", split=split, **fields)))


def reasons(items) -> list[str]:
    return [item.reason for item in items if isinstance(item, Reject)]


def vqa_files(folder: Path, questions=None, annotations=None) -> dict:
    asked = questions or [
        {"image_id": 25, "question": "What is it?", "question_id": 25006},
        {"image_id": 25, "question": "Where?", "question_id": 25014},
    ]
    said = annotations or [
        {
            "question_id": row["question_id"],
            "image_id": row["image_id"],
            "answer_type": "other",
            "question_type": "what",
            "multiple_choice_answer": "tree",
            "answers": [{"answer": word, "answer_id": at} for at, word in enumerate(["log"] * 3 + ["tree"] * 7)],
        }
        for row in asked
    ]
    return {
        "questions": write(folder / "q.json", {"data_subtype": "train2014", "questions": asked}),
        "annotations": write(folder / "a.json", {"annotations": said}),
    }


def test_every_reader_is_there_and_begins_with_an_excerpt():
    import importlib

    for name, place in READERS.items():
        assert callable(find_reader(name))
        module = importlib.import_module(f"mmtune.readers.{place.split(':')[0]}")
        assert "::\n\n    " in module.__doc__
    with pytest.raises(RecipeError, match="no reader") as error:
        find_reader("vqa_v1")
    assert "vqa_v2" in error.value.hint


def test_vqa_keeps_ten_answers_and_teaches_the_most_common(tmp_path: Path):
    first = read("vqa_v2", **vqa_files(tmp_path))[0]
    assert first.id == "s/25006" and first.text == "What is it?"
    assert len(first.references) == 10 and first.references[0] == "log" and first.target == "tree"
    assert first.media == (Medium("image", "COCO_train2014_000000000025.jpg"),)
    assert first.metadata["answer_type"] == "other" and first.metadata["question_type"] == "what"


def test_vqa_finds_the_images_name(tmp_path: Path):
    files = vqa_files(tmp_path)
    for name in ("COCO_train2014_000000000025.jpg", "000000000025.jpg", "25.jpg", "25.png"):
        images = tmp_path / name.replace(".", "_")
        images.mkdir()
        (images / name).touch()
        assert read("vqa_v2", images=images, **files)[0].media[0].path == name


def test_vqa_join_in_any_order_and_orphans(tmp_path: Path):
    asked = [{"image_id": at, "question": f"q{at}?", "question_id": at} for at in range(50)]
    said = [{"question_id": at, "multiple_choice_answer": f"a{at}", "answers": []} for at in range(3, 53)][::-1]
    items = read("vqa_v2", **vqa_files(tmp_path, asked, said))
    kept = [item for item in items if isinstance(item, Record)]
    assert {item.text[1:-1] for item in kept} == {item.target[1:] for item in kept} == {str(at) for at in range(3, 50)}
    assert all(item.text[1:-1] == item.target[1:] for item in kept)
    assert Counter(reasons(items)) == {"no_annotation": 3, "no_question": 3}


def test_vqa_refusals(tmp_path: Path):
    asked = [{"image_id": at, "question": "q?", "question_id": at} for at in range(5)]
    asked[0]["question"] = " "
    asked[1]["question"] = 7
    said = [{"question_id": at, "image_id": at, "multiple_choice_answer": "a", "answers": []} for at in range(5)]
    said[2] = {"question_id": 2, "multiple_choice_answer": "", "answers": [{"answer": " "}]}
    said[3]["image_id"] = 9
    said[4]["answers"] = [{"answer": None}]
    items = read("vqa_v2", **vqa_files(tmp_path, asked, said))
    assert reasons(items) == ["empty_question", "bad_field", "empty_answer", "id_mismatch", "bad_field"]
    assert "/answers/0/answer" in items[-1].detail


def test_vqa_errors(tmp_path: Path):
    files = vqa_files(tmp_path)
    twice = [{"image_id": 1, "question": "q?", "question_id": 1}] * 2
    with pytest.raises(DataError) as error:
        read("vqa_v2", questions=write(tmp_path / "t.json", {"questions": twice}), annotations=files["annotations"])
    assert error.value.code == "duplicate_id"
    with pytest.raises(DataError, match=r"gone\.json"):
        read("vqa_v2", questions=files["questions"], annotations=tmp_path / "gone.json")
    with pytest.raises(DataError) as error:
        read("vqa_v2", questions=write(tmp_path / "e.json", {"questions": []}), annotations=files["annotations"])
    assert error.value.code == "empty_input"
    with pytest.raises(RecipeError, match="annotations"):
        read("vqa_v2", questions=files["questions"])
    test_rows = read("vqa_v2", split="test", questions=files["questions"])
    assert [row.references for row in test_rows] == [(), ()]


COCO = {
    "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
    "annotations": [
        {"image_id": 1, "id": 10, "caption": "A cat."},
        {"image_id": 1, "id": 11, "caption": "The  cat.\n"},
        {"image_id": 2, "id": 12, "caption": " "},
        {"image_id": 3, "id": 13, "caption": "A dog."},
    ],
}


def test_coco_captions(tmp_path: Path):
    path = write(tmp_path / "c.json", dict(reversed(COCO.items())))
    items = read("coco_captions", annotations=path)
    assert [(r.id, r.media[0].path, r.references) for r in items[:2]] == [
        ("s/10", "1.jpg", ("A cat.",)),
        ("s/11", "1.jpg", ("The cat.",)),
    ]
    assert reasons(items) == ["empty_answer", "no_image"]
    grouped = [item for item in read("coco_captions", "val", annotations=path) if isinstance(item, Record)]
    assert [(r.id, r.references) for r in grouped] == [("s/image-1", ("A cat.", "The cat."))]


def instances(folder: Path, boxes: list[tuple[int, int, int]], images: int = 40) -> Path:
    value = {
        "images": [{"id": at, "file_name": f"{at}.jpg"} for at in range(images)],
        "annotations": [
            {"id": at, "image_id": image, "category_id": category, "iscrowd": crowd, "bbox": [0, 0, 1, 1]}
            for at, (image, category, crowd) in enumerate(boxes)
        ],
        "categories": [{"id": at, "name": name} for at, name in enumerate(["person", "dog", "bus", "wine glass"])],
    }
    return write(folder / "i.json", value)


def test_coco_instances_counts_and_crowds(tmp_path: Path):
    path = instances(tmp_path, [(0, 0, 0), (0, 0, 0), (0, 1, 0), (0, 1, 1), (1, 2, 0), (2, 3, 0)])
    items = read("coco_instances", annotations=path)
    counts = {(r.metadata["image_id"], r.metadata["category"]): r.references[0] for r in items if r.task == "count"}
    # The dogs of image 0 have a crowd box: no count, but they are there.
    assert counts == {("0", "person"): "2", ("1", "bus"): "1", ("2", "wine glass"): "1"}
    assert next(r for r in items if r.task == "count").text == "How many people are in the image?"
    there = {r.metadata["category"]: r.references[0] for r in items if r.id.startswith("s/0-presence")}
    assert there == {"person": "yes", "dog": "yes", "bus": "no", "wine glass": "no"}
    assert {r.task for r in read("coco_instances", annotations=path, tasks=("count",))} == {"count"}
    assert [plural(word) for word in ("bench", "knife", "cherry", "sheep", "toothbrush")] == [
        "benches", "knives", "cherries", "sheep", "toothbrushes",
    ]  # fmt: skip


def test_coco_instances_negatives_are_balanced_and_deterministic(tmp_path: Path):
    boxes = [(image, category, 0) for image in range(40) for category in range(4) if (image * 7 + category) % 3 == 0]
    path = instances(tmp_path, boxes)
    items = read("coco_instances", annotations=path, tasks=("presence",))
    answers = Counter(item.references[0] for item in items)
    assert answers["yes"] == answers["no"] == len(boxes)
    assert items == read("coco_instances", annotations=path, tasks=("presence",))
    assert items != read("coco_instances", annotations=path, tasks=("presence",), seed=1)
    present = {(image, category) for image, category, _ in boxes}
    for item in items:
        image, category = item.id.removeprefix("s/").split("-presence-")
        assert ((int(image), int(category)) in present) == (item.references == ("yes",))


def test_flickr_in_four_layouts(tmp_path: Path):
    rows = [("1.jpg", 0, "A man ."), ("1.jpg", 1, "Two, men ."), ("2.jpg", 0, "A dog .")]
    token = write(tmp_path / "r.token", "".join(f"{i}#{n}\t{c}\n" for i, n, c in rows))
    bars = write(
        tmp_path / "r.csv", "image_name| comment_number| comment\n" + "".join(f"{i}| {n}| {c}\n" for i, n, c in rows)
    )
    with open(tmp_path / "captions.txt", "w", newline="") as handle:
        csv.writer(handle).writerows([("image", "caption"), *((i, c) for i, _, c in rows)])
    split = {"1.jpg": "train", "2.jpg": "val"}
    karpathy = {
        "images": [
            {
                "filename": name,
                "split": split[name],
                "sentences": [{"raw": c, "tokens": []} for i, _, c in rows if i == name],
            }
            for name in split
        ],
        "dataset": "flickr30k",
    }
    named = {name: [c for i, _, c in rows if i == name] + [f"flickr30k-images/{name}"] for name in split}
    said = [(c, i) for i, _, c in rows]
    for path in (token, bars, tmp_path / "captions.txt", write(tmp_path / "n.json", named)):
        items = read("flickr30k", path=path)
        assert [(r.references[0], r.media[0].path) for r in items] == said, path
        assert len({r.id for r in items}) == 3
    first = read("flickr30k", path=write(tmp_path / "k.json", karpathy))
    assert [(r.references[0], r.media[0].path) for r in first] == said[:2]
    grouped = read("flickr30k", "test", path=token)
    assert [(r.id, len(r.references)) for r in grouped] == [("s/1.jpg", 2), ("s/2.jpg", 1)]
    broken = write(tmp_path / "b.token", "1.jpg#0 no tab\n1.jpg#1\t \n2.jpg#0\tA dog .\n")
    assert reasons(read("flickr30k", path=broken)) == ["bad_row", "empty_answer"]


def test_chartqa(tmp_path: Path):
    rows = [
        {"imgname": "1.png", "query": "How many?", "label": "28.6"},
        {"imgname": "1.png", "query": "Which?", "label": "[Yes, No]"},
        {"imgname": "1.png", "query": "Which?", "label": 3},
        {"imgname": "1.png", "query": "Which?", "label": ""},
        {"imgname": "1.png", "query": "Which?"},
    ]
    (tmp_path / "png").mkdir()
    items = read("chartqa", path=write(tmp_path / "test_human.json", rows))
    assert [item.references for item in items[:3]] == [("28.6",), ("[Yes, No]",), ("3",)]
    assert items[0].media == (Medium("image", "png/1.png"),) and items[0].metadata == {"part": "human"}
    assert reasons(items) == ["empty_answer", "bad_field"]


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


def test_table_gives_the_same_records_from_every_format(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"k": str(at), "q": f"what, {at}?", "a": f"ä{at}", "img": f"{at}.png"} for at in range(5)]
    write(tmp_path / "t.jsonl", rows)
    write(tmp_path / "t.json", rows)
    write(tmp_path / "d.json", {"data": rows, "version": 1})
    write(tmp_path / "o.json", {row["k"]: row for row in rows})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    for name, delimiter in (("t.csv", ","), ("t.tsv", "\t"), ("semi.csv", ";")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as handle:
            writer = csv.DictWriter(handle, rows[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    columns = {"id": "k", "question": "q", "answer": "a", "image": "pics/{img}"}
    extra = {"d.json": {"rows": "data"}, "semi.csv": {"delimiter": ";"}}
    seen = []
    for name in ("t.jsonl", "t.json", "d.json", "o.json", "t.parquet", "t.csv", "t.tsv", "semi.csv"):
        items = read("table", path=tmp_path / name, columns={**columns, **extra.get(name, {})})
        seen.append([(r.id, r.task, r.text, r.references, r.media) for r in items])
    assert seen[0][2] == ("s/2", "vqa", "what, 2?", ("ä2",), (Medium("image", "pics/2.png"),))
    assert all(found == seen[0] for found in seen)


def test_table_columns(tmp_path: Path):
    path = write(tmp_path / "t.jsonl", [{"A": "x", "B": "y", "right": "y", "n": 3.0, "ok": True, "none": None}])
    columns = {"question": "=Which?", "options": ["A", "B"], "answer": "right", "metadata": ["n", "ok", "none"]}
    (row,) = read("table", path=path, columns=columns)
    assert (row.text, row.options, row.metadata, row.task) == (
        "Which?",
        ("x", "y"),
        {"n": "3", "ok": "yes"},
        "instruction",
    )
    (row,) = read("table", path=path, columns={"answer": "right", "image": "A", "options": "=x|y"})
    assert (row.task, row.options) == ("label", ("x", "y"))
    (row,) = read("table", path=path, columns={"answer": "right", "image": "A"}, tasks=("caption",))
    assert row.task == "caption"
    assert reasons(read("table", path=path, columns={"answer": "gone"})) == ["bad_field"]
    assert reasons(read("table", path=path, columns={"answer": "none"})) == ["empty_answer"]
    with pytest.raises(RecipeError, match="unknown name 'anser'"):
        read("table", path=path, columns={"anser": "A"})
    with pytest.raises(RecipeError, match="needs `columns`"):
        read("table", path=path)


def test_table_csv_faults(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'q,a\nfine,yes\nshort\nbad \xff,yes\n"two\nlines",yes\n\nq,\n')
    items = read("table", path=path, columns={"question": "q", "answer": "a"})
    assert reasons(items) == ["bad_row", "bad_unicode", "empty_answer"]
    assert [item.text for item in items if isinstance(item, Record)] == ["fine", "two\nlines"]
    with pytest.raises(DataError) as error:
        read("table", path=path, columns={"question": "query", "answer": "a"})
    assert error.value.code == "missing_column" and "q, a" in error.value.hint
    path.write_text("q,a,a\nx,yes,no\n")
    with pytest.raises(DataError) as error:
        read("table", path=path, columns={"question": "{q}", "answer": "{a}"})
    assert error.value.code == "duplicate_column" and "2 columns named 'a'" in error.value.message
    assert len(read("table", path=path, columns={"answer": "q"})) == 1
    broken = tmp_path / "t.parquet"
    broken.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError) as error:
        read("table", path=broken, columns={"answer": "a"})
    assert error.value.code == "bad_parquet"
    for name in ("e.jsonl", "e.csv", "e.txt"):
        (tmp_path / name).touch()
        with pytest.raises(DataError) as error:
            read("table", path=tmp_path / name, columns={"answer": "a"})
        assert error.value.code == "empty_input"


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"delimiter": ";;"}, "columns.delimiter is ';;'"),
        ({"delimiter": ""}, "columns.delimiter is ''"),
        ({"delimiter": "\n"}, "columns.delimiter is"),
        ({"delimiter": 0}, "columns.delimiter is 0"),
        ({"question": ["q", "a"]}, "columns.question is a list; it takes one column"),
    ],
)
def test_a_column_map_that_cannot_be_followed_is_a_usage_error(tmp_path: Path, columns, said):
    (tmp_path / "t.csv").write_text("q,a\nx,y\n")
    with pytest.raises(RecipeError, match=re.escape(said)):
        read("table", path=tmp_path / "t.csv", columns={"answer": "a", **columns})


def test_odd_parquet(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "t.parquet"
    text = pa.array([b"fine", b"\xff", b"too"]).view(pa.string())
    pq.write_table(pa.table({"q": text, "a": [1.0, 2.0, float("nan")]}), path)
    one, *refused = read("table", path=path, columns={"question": "q", "answer": "a"})
    assert (one.text, one.references) == ("fine", ("1",))
    assert [(item.where, item.reason) for item in refused] == [
        ("t.parquet#1", "bad_unicode"),
        ("t.parquet#2", "bad_field"),
    ]
    pq.write_table(pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["a", "a"]), path)
    with pytest.raises(DataError) as error:
        read("table", path=path, columns={"answer": "a"})
    assert error.value.code == "duplicate_column"


def test_a_row_without_its_question_is_refused_where_one_is_asked(tmp_path: Path):
    path = write(tmp_path / "q.jsonl", [{"q": "Why?", "a": "so", "i": "a.jpg"}, {"q": " ", "a": "so", "i": "b.jpg"}])
    for columns in ({"question": "q", "answer": "a"}, {"question": "q", "answer": "a", "image": "i"}):
        assert reasons(read("table", path=path, columns=columns)) == ["empty_question"]
    columns = {"text": "q", "answer": "a", "image": "i"}
    assert not reasons(read("table", path=path, columns=columns, tasks=("caption",)))
    assert not reasons(read("table", path=path, columns={"answer": "a"}))


def test_a_refused_row_has_the_id_that_it_would_have_had(tmp_path: Path):
    rows = [{"id": 7, "name": "x", "q": "", "a": "y"}, {"id": "", "name": "", "q": "", "a": "y"}]
    path, columns = write(tmp_path / "r.jsonl", rows), {"question": "q", "answer": "a"}
    named = [read("table", path=path, columns=columns | own) for own in ({"id": "id"}, {"id": "name"}, {})]
    assert [[item.id for item in items] for items in named] == [
        ["s/7", "s/train-1"],
        ["s/x", "s/train-1"],
        ["s/train-0", "s/train-1"],
    ]
    assert [item.id for item in read("messages", path=path)] == ["s/7", "s/train-1"]


@pytest.mark.parametrize(
    ("cell", "items"),
    [
        (["a b, c", "C|D"], ("a b, c", "C|D")),
        (["ünï 🦄"], ("ünï 🦄",)),
        ([], ()),
        (None, ()),
        ([7, 8], ("7", "8")),
        (7, ("7",)),
        ("1 2,3|4", ("1", "2", "3", "4")),
        ('["Alien", "Paris, Texas"]', ("Alien", "Paris, Texas")),
        (["nan"], ("nan",)),
        (["a", None], "/past/1: expected an item, found null"),
        (["a", ""], "/past/1: expected an item, found nothing"),
        ("nan", "'nan' is no item"),
        ("a,null", "'null' is no item"),
        ('["Alien", NaN]', "/past: begins like a list"),
        ("['1', '2']", "/past: begins like a list"),
        ({"a": 1}, "expected a string, found an object"),
    ],
)
def test_the_items_of_a_history(tmp_path: Path, cell, items):
    path = write(tmp_path / "h.jsonl", [{"past": cell, "next": "x"}])
    (found,) = read("table", path=path, columns={"history": "past", "answer": "next"})
    if isinstance(items, str):
        assert isinstance(found, Reject) and found.reason == "bad_field" and items in found.detail
    else:
        assert found.history == items


def test_a_history_in_columns_has_the_filled_ones(tmp_path: Path):
    path = write(tmp_path / "h.csv", "a,b,c,next\none two,,three,x\n")
    (found,) = read("table", path=path, columns={"history": ["a", "b", "c"], "answer": "next"})
    assert found.history == ("one two", "three")


def test_folder(tmp_path: Path):
    for name in ("cat/1.jpg", "cat/2.PNG", "dog/1.wav", "dog/notes.txt", ".hidden/x.jpg", "top.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    items = read("folder", path=tmp_path)
    kept = [item for item in items if isinstance(item, Record)]
    assert [(r.id, r.references, r.options, r.media[0].modality) for r in kept] == [
        ("s/cat/1.jpg", ("cat",), ("cat", "dog"), "image"),
        ("s/cat/2.PNG", ("cat",), ("cat", "dog"), "image"),
        ("s/dog/1.wav", ("dog",), ("cat", "dog"), "audio"),
    ]
    assert sorted(reasons(items)) == ["no_label", "not_media"]
    digits = tmp_path / "digits"
    digits.mkdir()
    for name in ("7_ann_0.wav", "3_bob_9.wav", "odd.wav"):
        (digits / name).touch()
    items = read("folder", path=digits, columns={"label": r"(?P<label>\d)_(?P<speaker>[a-z]+)_"})
    assert [(r.references, r.metadata) for r in items if isinstance(r, Record)] == [
        (("3",), {"speaker": "bob"}),
        (("7",), {"speaker": "ann"}),
    ]
    assert reasons(items) == ["no_label"]
    (only,) = read("folder", path=digits, columns={"label": r"(\d)_", "keep": "_0"})
    assert only.references == ("7",)
    with pytest.raises(RecipeError, match="regular expression"):
        read("folder", path=digits, columns={"label": "("})


def test_a_file_whose_name_is_not_utf8_is_refused(tmp_path: Path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").touch()
    for name in (b"/cat/\xff.png", b"/\xfe"):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + name))
        (path / "b.png" if not path.suffix else path).parent.mkdir(exist_ok=True)
        (path / "b.png" if not path.suffix else path).touch()
    items = read("folder", path=tmp_path)
    assert sorted(reasons(items)) == ["bad_unicode"] * 2
    assert [item.options for item in items if isinstance(item, Record)] == [("cat",)]


def test_hf_from_a_saved_folder(tmp_path: Path):
    import datasets

    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    saved = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list([{"messages": turns}] * 3),
            "validation": datasets.Dataset.from_list([{"messages": turns}]),
        }
    )
    saved.save_to_disk(tmp_path / "chat")
    assert len(read("hf", path=tmp_path / "chat")) == 3
    assert len(read("hf", "val", path=tmp_path / "chat")) == 1
    with pytest.raises(DataError) as error:
        read("hf", "test", path=tmp_path / "chat")
    assert error.value.code == "split_missing"
    features = datasets.Features(
        {"img": datasets.Image(), "q": datasets.Value("string"), "a": datasets.Value("string")}
    )
    rows = [{"img": {"bytes": b"not decoded", "path": None}, "q": "what?", "a": "x"}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "vqa")
    (row,) = read("hf", path=tmp_path / "vqa", columns={"image": "img", "question": "q", "answer": "a"})
    assert row.media == (Medium("image", "", data=b"not decoded"),) and row.task == "vqa"
    with pytest.raises(CapabilityError) as unreachable:
        read("hf", path=Path("nobody/no-such-dataset"), columns={"answer": "a"})
    assert "save_to_disk" in unreachable.value.hint
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "x.parquet").write_bytes(b"no table")
    for folder, code in (("gone", "file_missing"), ("words", "bad_dataset")):
        with pytest.raises(DataError) as error:
            read("hf", path=tmp_path / folder, columns={"answer": "a"})
        assert error.value.code == code


def test_limit_takes_a_subset_in_file_order(tmp_path: Path):
    items = [Record(f"s/{at}", "s", "vqa", "train", text="q") for at in range(200)]
    items.insert(50, Reject("f:1", "", "bad_json"))
    ten, forty = (list(take(lambda: iter(items), limit)) for limit in (10, 40))
    assert len(ten) == 10 and len(forty) == 40
    assert [item for item in forty if item in ten] == ten
    assert [item for item in items if item in forty] == forty
    assert list(take(lambda: iter(items), None)) == items
    assert [len(part) for part in cut(iter(items), 100)] == [100, 100, 1]


def test_repeated_ids_are_found_over_parts(monkeypatch):
    from mmtune.readers import repeated

    monkeypatch.setattr(repeated, "_RECENT", 7)
    monkeypatch.setattr(repeated, "_MOST_ARRAYS", 2)
    values = [at % 60 for at in range(150)]
    seen, answers = SeenIds(), []
    for start in range(0, 150, 4):
        answers += seen.repeated(values[start : start + 4])
    assert answers == [at >= 60 for at in range(150)]
    items = [Record("s/1", "s", "vqa", "train"), Record("s/1", "s", "vqa", "train", where="f:2")]
    assert [type(item) for item in drop_repeated(items, SeenIds(), "first")] == [Record, Reject]
    with pytest.raises(DataError, match="f:2") as error:
        drop_repeated(items, SeenIds(), "error")
    assert error.value.code == "duplicate_id"


def test_a_row_without_its_image_is_refused_and_images_may_be_none(tmp_path: Path):
    path = write(tmp_path / "t.jsonl", [{"q": "a?", "a": "b", "i": name} for name in ("", "x.png")])
    one = read("table", path=path, columns={"question": "q", "answer": "a", "image": "i"})
    assert reasons(one) == ["no_image"]
    assert "/i (for image): empty" in next(item.detail for item in one if isinstance(item, Reject))
    many = read("table", path=path, columns={"question": "q", "answer": "a", "images": "i"})
    assert [len(item.media) for item in many] == [0, 1]


def test_a_wrong_cell_is_named_by_its_own_column(tmp_path: Path):
    path = write(tmp_path / "t.jsonl", [{"ask": ["a?"], "a": "b"}, {"ask": "a?", "a": " "}])
    items = read("table", path=path, columns={"instruction": "ask", "output": "a"})
    assert [item.detail for item in items] == [
        "/ask (for instruction): expected a string, found a list",
        "/a: the answer is empty",
    ]
