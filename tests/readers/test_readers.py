"""Each reader on a tiny file in the official layout, and what it refuses."""

import csv
from collections import Counter
from pathlib import Path

import pytest

from mmtune.errors import DataError, RecipeError
from mmtune.readers import READERS, find_reader
from mmtune.readers.coco_instances import plural
from mmtune.readers.limit import cut, take
from mmtune.readers.repeated import SeenIds, drop_repeated
from mmtune.readers.vqa_v2 import ImageNames
from mmtune.records import Medium, Record, Reject
from tests.readers.reading import read, reasons, write


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


@pytest.mark.parametrize("subtype", ["", "train2014"])
def test_vqa_images_are_found_whatever_kinds_of_ids_stand_together(tmp_path: Path, subtype: str):
    """An id of twelve digits, or a string, has fewer names than a short number."""
    files = {5: "5.jpg", 123456789012: "123456789012.jpg", "cat": "cat.png", 7: f"COCO_{subtype}_000000000007.jpg"}
    files[7] = files[7] if subtype else "000000000007.jpg"
    for name in files.values():
        (tmp_path / name).touch()
    names = ImageNames(tmp_path, subtype)
    for order in (list(files), list(reversed(files))):
        assert [names.find(own) for own in order] == [files[own] for own in order]
    assert names.find(9) == (f"COCO_{subtype}_000000000009.jpg" if subtype else "000000000009.jpg")


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


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_image_id_of_two_files_is_refused_with_what_names_it(tmp_path: Path, split: str):
    """As where two files that count their images from 1 were joined: either picture may be the wrong one."""
    joined = {
        "images": [*COCO["images"], {"id": 1, "file_name": "other/1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
        "annotations": [*COCO["annotations"][:2], {"image_id": 2, "id": 14, "caption": "A bus."}],
    }
    items = read("coco_captions", split, annotations=write(tmp_path / "c.json", joined))
    (kept,) = (item for item in items if isinstance(item, Record))
    assert (kept.media[0].path, kept.references) == ("2.jpg", ("A bus.",))
    details = [item.detail for item in items if not isinstance(item, Record)]
    assert details == [
        "/id: image 1 stands for 'other/1.jpg' and for another file_name",
        *["/image_id: image 1 stands twice among the file's images"] * 2,
    ]
    assert set(reasons(items)) == {"duplicate_id"}
    boxes = [{"id": at, "image_id": image, "category_id": 3, "bbox": [0, 0, 1, 1]} for at, image in enumerate((1, 2))]
    counted = {**joined, "annotations": boxes, "categories": [{"id": 3, "name": "bus"}]}
    items = read("coco_instances", split, annotations=write(tmp_path / "i.json", counted))
    assert {item.media[0].path for item in items if isinstance(item, Record)} == {"2.jpg"}
    assert reasons(items) == ["duplicate_id"] * 2


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
