"""The bundled scenes are what their README says: official files, true answers, disjoint scans."""

from __future__ import annotations

import gzip
import importlib.util
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


def load_script(name: str) -> ModuleType:
    """A script of the data folder as a module."""
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


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
        inked = [f"{digit['color']} {digit['digit']}" for digit in image["scene"]["digits"]]
        assert re.findall(r"[a-z]+ \d", captions[image["id"]][0]) == inked


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


def test_recorded_scans_are_of_the_digits_they_stand_for() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn brings the scans; it is in the dev extra")
    from sklearn.datasets import load_digits

    classes = load_digits().target
    for split in SPLITS:
        for scene in scenes_of(split).values():
            scans = [digit["scan"] for digit in scene["digits"]]
            assert len(set(scans)) == len(scans)
            assert [classes[scan] for scan in scans] == [digit["digit"] for digit in scene["digits"]]


@pytest.mark.parametrize("split", SPLITS)
def test_the_script_paints_the_same_pixels_and_asks_the_same(split: str) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn brings the scans; it is in the dev extra")
    import numpy as np
    from PIL import Image

    make_scenes = load_script("make_scenes")
    scans, classes = make_scenes.load_scans()
    scenes, base, compare = make_scenes.make_split(split, make_scenes.split_scans(classes)[split])
    for name, rows in (("base", base), ("compare", compare)):
        questions, annotations = make_scenes.vqa_files(split, rows)
        assert questions == read(f"{name}_{split}_questions")
        assert annotations == read(f"{name}_{split}_annotations")
    assert json.loads(json.dumps(make_scenes.caption_file(scenes))) == read(f"captions_{split}")
    for scene in scenes[:20]:
        # Pixels, not file bytes: the latter differ between builds of zlib.
        with Image.open(DATA / "scenes" / split / f"{scene.image_id:012d}.png") as picture:
            assert np.array_equal(np.asarray(picture), np.asarray(make_scenes.paint(scene, scans)))


@pytest.fixture(scope="module")
def remade_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model's folder, made anew without weights."""
    folder = tmp_path_factory.mktemp("base")
    make_base = load_script("make_base")
    tokenizer = make_base.make_tokenizer()
    make_base.make_processor(tokenizer).save_pretrained(folder)
    make_base.make_config(tokenizer).save_pretrained(folder)
    return folder


def test_the_script_makes_the_bundled_tokenizer_and_processor(remade_base: Path) -> None:
    for name in ("tokenizer.json", "processor_config.json"):
        bundled, remade = (json.loads((folder / name).read_text("utf-8")) for folder in (DATA / "base", remade_base))
        assert bundled == remade, name
    template = (DATA / "base" / "chat_template.jinja").read_text("utf-8")
    assert template == (remade_base / "chat_template.jinja").read_text("utf-8")


def test_the_bundled_config_has_the_shape_of_the_script(remade_base: Path) -> None:
    bundled, remade = (
        json.loads((folder / "config.json").read_text("utf-8")) for folder in (DATA / "base", remade_base)
    )
    for part in ("vision_config", "text_config"):
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            assert bundled[part][key] == remade[part][key], (part, key)
    assert bundled["image_seq_length"] == remade["image_seq_length"]


def test_any_text_survives_the_bundled_tokenizer() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / "base")
    for text in (
        "Is the left digit less than 7?",
        "  two  spaces\n\ttab",
        "Zürich 漢字 \U0001f600 12.50 %",
        "\x00\x7f",
    ):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    for word in ("yes", "no", "left", "right", "red", "purple", "7"):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word


def test_any_picture_becomes_sixteen_tokens() -> None:
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(DATA / "base")
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    for mode, size in (("RGB", (640, 480)), ("L", (1, 300)), ("RGBA", (48, 48)), ("P", (17, 5))):
        batch = processor(images=Image.new(mode, size), text="<image>hello", return_tensors="np")
        assert batch["pixel_values"].shape == (1, 3, 48, 48)
        assert (batch["input_ids"] == image_id).sum() == 16


def test_bundled_chat_template_shows_every_kind_of_turn() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / "base")
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "left"}}}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "7"},
    ]
    text = tokenizer.apply_chat_template(turns, tools=[{"name": "look"}], tokenize=False, add_generation_prompt=True)
    assert text == (
        '<|im_start|>tools\n{"name": "look"}\n<|im_end|>\n'
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<image>What?<|im_end|>\n"
        '<|im_start|>assistant\n\ncall look {"at": "left"}<|im_end|>\n'
        "<|im_start|>tool\n7<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_bundled_data_stays_small() -> None:
    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert size(DATA / "scenes") < 6_000_000
    assert size(DATA / "base") < 10_000_000


def test_rows_without_a_question_tell_the_left_digit():
    maker = load_script("make_left")
    for split, count in maker.ROWS.items():
        scenes = scenes_of(split)
        lines = [json.loads(line) for line in (ANNOTATIONS / f"left_{split}.jsonl").read_text().splitlines()]
        assert [tuple(line) for line in lines] == maker.rows(split) and len(lines) == count
        for name, answer in lines:
            assert (DATA / "scenes" / split / name).is_file()
            assert answer == truth(maker.QUESTION, scenes[int(name.removesuffix(".png"))])
