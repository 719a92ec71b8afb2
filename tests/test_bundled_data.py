"""The bundled scenes are what their README says: official files, true answers, disjoint scans."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

DATA = Path(__file__).resolve().parents[1] / "data"
ANNOTATIONS = DATA / "scenes" / "annotations"
SPLITS = {"train": 2400, "val": 200, "test": 800}
VQA_FILES = [(name, split) for name in ("base", "compare") for split in SPLITS]


def read(stem: str) -> dict:
    """One annotation document, compressed or not."""
    packed = ANNOTATIONS / f"{stem}.json.gz"
    if packed.exists():
        return json.loads(gzip.decompress(packed.read_bytes()))
    return json.loads((ANNOTATIONS / f"{stem}.json").read_text(encoding="utf-8"))


def scenes_of(split: str) -> dict[int, dict]:
    """What was painted on each picture of a split, by image id."""
    return {image["id"]: image["scene"] for image in read(f"captions_{split}")["images"]}


def truth(question: str, scene: dict) -> str:
    """The answer to a question, worked out anew from what was painted."""
    digits = scene["digits"]
    words = re.findall(r"[a-z]+|\d+", question.lower())

    def yes_no(fact: bool) -> str:
        return "yes" if fact else "no"

    def named(row: str | None, side: str | None) -> dict:
        (found,) = [d for d in digits if (row or "") in d["corner"] and (side or "") in d["corner"]]
        return found

    sides = [word for word in words if word in ("left", "right")]
    row = next((word for word in words if word in ("top", "bottom")), None)
    if "background" in words:
        return scene["background"]
    if "many" in words:
        return str(len(digits))
    if "same" in words:
        return yes_no(digits[0]["digit"] == digits[1]["digit"])
    if "greater" in words:
        return yes_no(named(None, sides[0])["digit"] > named(None, sides[1])["digit"])
    if "higher" in words:
        return named("top", None)["corner"].removeprefix("top ")
    if {"there", "show"} & set(words):
        return yes_no(int(words[-1]) in {digit["digit"] for digit in digits})
    digit = named(row, sides[0] if sides else None)
    if "color" in words:
        return digit["color"]
    if "less" in words:
        return yes_no(digit["digit"] < int(words[-1]))
    return str(digit["digit"])


@pytest.fixture(scope="module")
def make_scenes() -> ModuleType:
    """The script that made the scenes, as a module."""
    spec = importlib.util.spec_from_file_location("make_scenes", DATA / "make_scenes.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_scenes"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["make_scenes"]


@pytest.mark.parametrize(("name", "split"), VQA_FILES)
def test_vqa_files_follow_the_official_layout(name: str, split: str) -> None:
    questions, annotations = read(f"{name}_{split}_questions"), read(f"{name}_{split}_annotations")
    assert {"info", "task_type", "data_type", "data_subtype", "license", "questions"} <= questions.keys()
    assert {"info", "data_type", "data_subtype", "license", "annotations"} <= annotations.keys()
    asked = {row["question_id"]: row for row in questions["questions"]}
    answered = {row["question_id"]: row for row in annotations["annotations"]}
    assert len(asked) == len(questions["questions"])
    assert asked.keys() == answered.keys()
    for key, row in answered.items():
        assert row["image_id"] == asked[key]["image_id"]
        assert row["answer_type"] in {"yes/no", "number", "other"}
        assert [answer["answer_id"] for answer in row["answers"]] == list(range(1, 11))
        assert {answer["answer"] for answer in row["answers"]} == {row["multiple_choice_answer"]}


@pytest.mark.parametrize(("name", "split"), VQA_FILES)
def test_every_answer_is_true_of_the_painted_scene(name: str, split: str) -> None:
    scenes = scenes_of(split)
    answers = {row["question_id"]: row for row in read(f"{name}_{split}_annotations")["annotations"]}
    for row in read(f"{name}_{split}_questions")["questions"]:
        expected = truth(row["question"], scenes[row["image_id"]])
        assert answers[row["question_id"]]["multiple_choice_answer"] == expected, row


@pytest.mark.parametrize("split", SPLITS)
def test_every_picture_decodes_and_has_two_true_captions(split: str) -> None:
    from PIL import Image

    document = read(f"captions_{split}")
    captions: dict[int, list[str]] = {}
    for row in document["annotations"]:
        captions.setdefault(row["image_id"], []).append(row["caption"])
    assert len(document["images"]) == SPLITS[split] == len(captions)
    names = {image["file_name"] for image in document["images"]}
    assert names == {path.name for path in (DATA / "scenes" / split).iterdir()}
    for image in document["images"]:
        with Image.open(DATA / "scenes" / split / image["file_name"]) as picture:
            picture.load()
            assert (picture.mode, picture.size) == ("RGB", (image["width"], image["height"]))
        values = [str(digit["digit"]) for digit in image["scene"]["digits"]]
        assert len(captions[image["id"]]) == 2
        for caption in captions[image["id"]]:
            assert re.findall(r"\d", caption) == values
            assert image["scene"]["background"] in caption


def test_splits_share_no_scan() -> None:
    scans = {
        split: {digit["scan"] for scene in scenes_of(split).values() for digit in scene["digits"]} for split in SPLITS
    }
    assert not scans["train"] & scans["val"]
    assert not scans["train"] & scans["test"]
    assert not scans["val"] & scans["test"]


def test_held_out_task_is_balanced_and_absent_from_the_base_tasks() -> None:
    for split in SPLITS:
        answers = [row["multiple_choice_answer"] for row in read(f"compare_{split}_annotations")["annotations"]]
        assert abs(answers.count("yes") - answers.count("no")) <= 1
        assert not any("greater" in row["question"] for row in read(f"base_{split}_questions")["questions"])


def test_the_script_paints_the_same_pixels_and_asks_the_same(make_scenes: ModuleType) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn brings the scans; it is in the dev extra")
    import numpy as np
    from PIL import Image

    scans, classes = make_scenes.load_scans()
    pools = make_scenes.split_scans(classes)
    for split in ("val", "test"):
        scenes, base, compare = make_scenes.make_split(split, pools[split])
        for name, rows in (("base", base), ("compare", compare)):
            questions, annotations = make_scenes.vqa_files(split, rows)
            assert questions == read(f"{name}_{split}_questions")
            assert annotations == read(f"{name}_{split}_annotations")
        assert json.loads(json.dumps(make_scenes.caption_file(scenes))) == read(f"captions_{split}")
        for scene in scenes[:20]:
            # Pixels, not file bytes: the latter differ between builds of zlib.
            stored = io.BytesIO((DATA / "scenes" / split / f"{scene.image_id:012d}.png").read_bytes())
            with Image.open(stored) as picture:
                assert np.array_equal(np.asarray(picture), np.asarray(make_scenes.paint(scene, scans)))


def test_bundled_data_stays_small() -> None:
    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert size(DATA / "scenes") < 6_000_000
    assert size(DATA / "base") < 10_000_000
