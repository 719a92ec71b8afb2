"""Write data/scenes: small pictures of real handwritten digits, with questions and captions.

Every digit is a scan of a person's handwriting (scikit-learn's ``load_digits``, the test part
of the UCI set "Optical Recognition of Handwritten Digits"), enlarged by a whole factor, tinted
and put on a coloured canvas. Train, val and test use disjoint scans. Run from anywhere::

    python data/make_scenes.py            # writes data/scenes, about 20 seconds

The same seed gives the same scenes; scikit-learn, NumPy and Pillow are all it needs.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SEED = 20261124
CANVAS_PX = 48
DIGIT_PX = 24
SCENES = {"train": 2400, "val": 200, "test": 800}
SCAN_SHARES = {"train": 0.72, "val": 0.08, "test": 0.20}
FIRST_IMAGE_ID = {"train": 1, "val": 100_001, "test": 200_001}
COMPARE_ROWS = {"train": 480, "val": 60, "test": 280}
QUESTIONS_PER_SCENE = 6

INK = {
    "red": (230, 40, 40),
    "green": (50, 200, 60),
    "blue": (70, 130, 255),
    "yellow": (250, 220, 40),
    "white": (250, 250, 250),
}
PAPER = {"black": (0, 0, 0), "gray": (80, 80, 80), "purple": (65, 0, 90)}
CORNERS = {"top left": (0, 0), "top right": (24, 0), "bottom left": (0, 24), "bottom right": (24, 24)}
SAME_WORDS = ("Are the left and right digits the same?", "Is the left digit the same as the right one?")
COUNT_WORDS = {1: "one digit", 2: "two digits", 3: "three digits"}


@dataclass(frozen=True)
class Digit:
    """One scan, its colour and the corner of the canvas that it fills."""

    digit: int
    scan: int
    color: str
    corner: str


@dataclass(frozen=True)
class Scene:
    """A canvas and its digits from left to right."""

    image_id: int
    background: str
    digits: tuple[Digit, ...]


@dataclass(frozen=True)
class Question:
    """A question with its one true answer, in the words of VQA v2's annotations."""

    text: str
    answer: str
    question_type: str
    answer_type: str


Ask = Callable[[random.Random], Question]


def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """The scans as (1797, 8, 8) floats in 0..1, and their classes."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images / 16.0, bunch.target


def split_scans(classes: np.ndarray) -> dict[str, dict[int, list[int]]]:
    """Scan numbers per split and class; every scan is in exactly one split."""
    rng = random.Random(SEED)
    pools: dict[str, dict[int, list[int]]] = {split: {} for split in SCENES}
    for digit in range(10):
        scans = [int(i) for i in np.flatnonzero(classes == digit)]
        rng.shuffle(scans)
        start = 0.0
        for split, share in SCAN_SHARES.items():
            stop = start + share
            pools[split][digit] = scans[round(start * len(scans)) : round(stop * len(scans))]
            start = stop
    return pools


def draw_scene(rng: random.Random, image_id: int, pools: dict[int, list[int]]) -> Scene:
    """A scene of one to three digits, each in a corner of its own; two of them always stand side by side.

    About two pairs of five show the same digit twice, never the same scan.
    """
    count = rng.choices((1, 2, 3), weights=(2, 6, 2))[0]
    values = [rng.randrange(10) for _ in range(count)]
    if count == 2 and rng.random() < 0.35:
        values[1] = values[0]
    if count == 2:
        corners = [rng.choice(("top left", "bottom left")), rng.choice(("top right", "bottom right"))]
    else:
        free = rng.sample(list(CORNERS), count)
        corners = [corner for corner in CORNERS if corner in free]
    digits: list[Digit] = []
    for value, corner in zip(values, corners, strict=True):
        taken = {digit.scan for digit in digits}
        scan = rng.choice([scan for scan in pools[value] if scan not in taken])
        digits.append(Digit(value, scan, rng.choice(list(INK)), corner))
    return Scene(image_id, rng.choice(list(PAPER)), tuple(digits))


def paint(scene: Scene, scans: np.ndarray) -> Image.Image:
    """The scene as an RGB picture: paper, and ink where the pen was."""
    canvas = np.empty((CANVAS_PX, CANVAS_PX, 3))
    canvas[:] = PAPER[scene.background]
    for digit in scene.digits:
        pen = np.kron(scans[digit.scan], np.ones((DIGIT_PX // 8, DIGIT_PX // 8)))[..., None]
        left, top = CORNERS[digit.corner]
        window = canvas[top : top + DIGIT_PX, left : left + DIGIT_PX]
        window[:] = window * (1 - pen) + np.array(INK[digit.color]) * pen
    return Image.fromarray(canvas.round().astype(np.uint8))


def yes_no(fact: bool) -> str:
    """``yes`` or ``no``."""
    return "yes" if fact else "no"


def ask_any(scene: Scene) -> Iterator[Ask]:
    """Questions that fit every scene."""
    shown = sorted({digit.digit for digit in scene.digits})
    absent = [value for value in range(10) if value not in shown]

    def count(rng: random.Random) -> Question:
        text = rng.choice(("How many digits are there?", "How many digits are in the picture?"))
        return Question(text, str(len(scene.digits)), "how many", "number")

    def background(rng: random.Random) -> Question:
        text = rng.choice(("What color is the background?", "What is the background color?"))
        return Question(text, scene.background, "what color is the", "other")

    def presence(rng: random.Random) -> Question:
        value = rng.choice(shown if rng.random() < 0.5 else absent)
        text = rng.choice(("Is there a {}?", "Does the picture show a {}?")).format(value)
        return Question(text, yes_no(value in shown), "is there a", "yes/no")

    yield from (count, background, presence)


def ask_digit(name: str, digit: Digit) -> Iterator[Ask]:
    """Questions about one digit, such as the one that is called ``left digit``."""

    def read(rng: random.Random) -> Question:
        text = f"Which digit is the {name}?" if name != "digit" else "What digit is this?"
        return Question(text, str(digit.digit), "which", "number")

    def color(rng: random.Random) -> Question:
        text = rng.choice(("What color is the {}?", "What is the color of the {}?"))
        return Question(text.format(name), digit.color, "what color is the", "other")

    def below(rng: random.Random) -> Question:
        limit = rng.randint(1, 9)
        return Question(f"Is the {name} less than {limit}?", yes_no(digit.digit < limit), "is the", "yes/no")

    yield from (read, color, below)


def ask_pair(scene: Scene) -> Iterator[Ask]:
    """Questions about the two digits of a pair."""
    left, right = scene.digits

    def same(rng: random.Random) -> Question:
        text = rng.choice(SAME_WORDS)
        return Question(text, yes_no(left.digit == right.digit), "are the", "yes/no")

    def higher(rng: random.Random) -> Question:
        side = "left" if left.corner == "top left" else "right"
        text = rng.choice(("Which digit is higher up, left or right?", "Which side has the higher digit?"))
        return Question(text, side, "which", "other")

    yield same
    if CORNERS[left.corner][1] != CORNERS[right.corner][1]:
        yield higher


def base_questions(rng: random.Random, scene: Scene) -> list[Question]:
    """The questions of one scene for the tasks that the base model learns."""
    first: list[Ask] = []
    others = list(ask_any(scene))
    if len(scene.digits) == 1:
        first += ask_digit("digit", scene.digits[0])
    elif len(scene.digits) == 2:
        for name, digit in zip(("left digit", "right digit"), scene.digits, strict=True):
            read, *rest = ask_digit(name, digit)
            first.append(read)
            others += rest
        others += ask_pair(scene)
    else:
        for digit in scene.digits:
            read, color, _ = ask_digit(f"{digit.corner} digit", digit)
            first.append(read)
            others.append(color)
    rng.shuffle(others)
    return [ask(rng) for ask in first + others][:QUESTIONS_PER_SCENE]


def compare_question(rng: random.Random, scene: Scene, answer: str) -> Question | None:
    """The held-out task, asked so that ``answer`` is true; None for scenes without two unequal digits."""
    if len(scene.digits) != 2 or scene.digits[0].digit == scene.digits[1].digit:
        return None
    left, right = (digit.digit for digit in scene.digits)
    one, other = ("left", "right") if (left > right) == (answer == "yes") else ("right", "left")
    text = rng.choice(("Is the {} digit greater than the {} one?", "Is the {} number greater than the {}?"))
    return Question(text.format(one, other), answer, "is the", "yes/no")


def compare_rows(rng: random.Random, scenes: Sequence[Scene], limit: int) -> list[tuple[int, Question]]:
    """Rows of the held-out task, half of them ``yes``: nothing but the picture tells which."""
    rows: list[tuple[int, Question]] = []
    for scene in scenes:
        question = compare_question(rng, scene, ("yes", "no")[len(rows) % 2])
        if question is not None:
            rows.append((scene.image_id, question))
    return rows[:limit]


def captions_of(scene: Scene) -> tuple[str, str]:
    """Two captions: one with colours, one with the count."""
    parts = [f"a {digit.color} {digit.digit}" for digit in scene.digits]
    values = [str(digit.digit) for digit in scene.digits]
    if len(parts) == 2:
        first, listed = f"{parts[0]} next to {parts[1]}", " and ".join(values)
    else:
        first = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
        listed = ", ".join(values[:-1]) + " and " + values[-1] if len(values) > 1 else values[0]
    second = f"{COUNT_WORDS[len(values)]}, {listed}, on a {scene.background} background"
    return f"{first} on {scene.background}", second


def vqa_files(split: str, rows: Sequence[tuple[int, Question]]) -> tuple[dict, dict]:
    """The official VQA v2 questions and annotations documents of some rows."""
    head = {
        "info": {"description": "mmtune scenes of handwritten digits", "version": "1.0", "year": 2026},
        "data_type": "scenes",
        "data_subtype": f"scenes_{split}",
        "license": {"name": "CC BY 4.0", "url": "https://creativecommons.org/licenses/by/4.0/"},
    }
    questions, annotations, asked = [], [], dict[int, int]()
    for image_id, question in rows:
        number = asked.get(image_id, 0)
        asked[image_id] = number + 1
        key = {"image_id": image_id, "question_id": image_id * 100 + number}
        questions.append({**key, "question": question.text})
        ten = [{"answer": question.answer, "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)]
        annotations.append(
            {
                **key,
                "question_type": question.question_type,
                "answer_type": question.answer_type,
                "multiple_choice_answer": question.answer,
                "answers": ten,
            }
        )
    return {**head, "task_type": "Open-Ended", "questions": questions}, {**head, "annotations": annotations}


def caption_file(scenes: Sequence[Scene]) -> dict:
    """The COCO captions document; ``scene`` of an image says what was painted, scans included."""
    images, annotations = [], []
    for scene in scenes:
        content = {"background": scene.background, "digits": [asdict(digit) for digit in scene.digits]}
        name = f"{scene.image_id:012d}.png"
        size = {"width": CANVAS_PX, "height": CANVAS_PX}
        images.append({"id": scene.image_id, "file_name": name, **size, "scene": content})
        for number, caption in enumerate(captions_of(scene)):
            key = {"image_id": scene.image_id, "id": scene.image_id * 10 + number}
            annotations.append({**key, "caption": caption})
    licence = {"id": 1, "name": "CC BY 4.0", "url": "https://creativecommons.org/licenses/by/4.0/"}
    info = {"description": "mmtune scenes of handwritten digits", "version": "1.0", "year": 2026}
    return {"info": info, "licenses": [licence], "images": images, "annotations": annotations}


def write_json(path: Path, document: dict) -> None:
    """Compact JSON; a path that ends in .gz is compressed without a time stamp."""
    text = json.dumps(document, separators=(",", ":")) + "\n"
    data = gzip.compress(text.encode(), 9, mtime=0) if path.suffix == ".gz" else text.encode()
    path.write_bytes(data)


def make_split(split: str, pools: dict[int, list[int]]) -> tuple[list[Scene], list, list]:
    """The scenes of one split, its base rows and its held-out rows."""
    rng = random.Random(f"{SEED}/{split}")
    first = FIRST_IMAGE_ID[split]
    scenes = [draw_scene(rng, first + i, pools) for i in range(SCENES[split])]
    base = [(scene.image_id, question) for scene in scenes for question in base_questions(rng, scene)]
    compare = compare_rows(rng, scenes, COMPARE_ROWS[split])
    return scenes, base, compare


def main() -> None:
    """Write every split below the folder given by ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "scenes")
    out: Path = parser.parse_args().out
    scans, classes = load_scans()
    pools = split_scans(classes)
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    for split in SCENES:
        scenes, base, compare = make_split(split, pools[split])
        folder = out / split
        folder.mkdir(exist_ok=True)
        for scene in scenes:
            paint(scene, scans).save(folder / f"{scene.image_id:012d}.png", optimize=True)
        write_json(out / "annotations" / f"captions_{split}.json", caption_file(scenes))
        # The base files hold most rows, and ten equal answers shrink to nothing when compressed.
        for name, rows, end in (("base", base, ".json.gz"), ("compare", compare, ".json")):
            questions, annotations = vqa_files(split, rows)
            write_json(out / "annotations" / f"{name}_{split}_questions{end}", questions)
            write_json(out / "annotations" / f"{name}_{split}_annotations{end}", annotations)
        print(f"{split}: {len(scenes)} scenes, {len(base)} base rows, {len(compare)} held-out rows")


if __name__ == "__main__":
    main()
