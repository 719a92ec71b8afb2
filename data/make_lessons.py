"""Write runs/omni/lessons.jsonl: the omni base's lessons, one conversation per line.

Each asks about one sound, one clip, a picture with a sound, or a scene that the base knows already, so that it is not
forgotten. What is hard to learn, the voice and whether picture and sound are the same, is often asked alone: beside
easier questions it would be a small part of what is learned from. Sounds, clips, scenes and their questions are those
of the train splits; made here are their arrangement, which picture goes with which sound, and which of a clip's digits
is named in a question for the one after or before it. Run from anywhere::

    python data/make_lessons.py
    mmtune run recipes/omni.yaml

The same bundled data give the same file.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent
LESSONS = {"sound": 4000, "match": 6000, "order": 2500, "way": 2200, "scene": 1800}
TURNS = 4
# One order lesson in so many asks for all digits alone.
LIST_ALONE = 4
MATCH = "Is the digit in the picture the one that is said?"
READ_PICTURE = "What digit is this?"

Turn = tuple[str, str]
Part = dict[str, str]


def script(name: str) -> ModuleType:
    """Another script of this folder as a module."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(kind: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of ``sounds`` or ``clips`` in the train split, by their own medium."""
    medium = {"sounds": "audio", "clips": "video"}[kind]
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with gzip.open(HERE / kind / "annotations" / "train.jsonl.gz", "rt", encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            found[row[medium]].append(row)
    return found


def pictures_by_digit() -> dict[str, list[str]]:
    """Train pictures that show one digit alone, by that digit."""
    document = json.loads((HERE / "scenes" / "annotations" / "captions_train.json").read_text(encoding="utf-8"))
    found: dict[str, list[str]] = defaultdict(list)
    for image in document["images"]:
        digits = image["scene"]["digits"]
        if len(digits) == 1:
            found[str(digits[0]["digit"])].append(image["file_name"])
    return found


def conversation(identifier: str, media: list[Part], turns: list[Turn]) -> dict[str, object]:
    """One conversation in the `messages` form; the media stand in its first turn."""
    messages = []
    for place, (question, answer) in enumerate(turns):
        content = [*(media if place == 0 else []), {"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"id": identifier, "messages": messages}


def sound_lessons(draw: random.Random) -> Iterator[dict[str, object]]:
    """A sound alone: the voice, or word, digit and voice in any order."""
    rows = rows_of("sounds")
    for number in range(LESSONS["sound"]):
        name = draw.choice(list(rows))
        turns = [(row["question"], row["answer"]) for row in rows[name] if row["question_type"] != "match"]
        if number % 2:
            turns = [(row["question"], row["answer"]) for row in rows[name] if row["question_type"] == "voice"]
        draw.shuffle(turns)
        yield conversation(f"sound-{number}", [{"type": "audio", "path": name}], turns)


def match_lessons(draw: random.Random) -> Iterator[dict[str, object]]:
    """A picture and a sound: are they of the same digit, and what each is."""
    rows, pictures = rows_of("sounds"), pictures_by_digit()
    for number in range(LESSONS["match"]):
        name = draw.choice(list(rows))
        (heard,) = [(row["question"], row["answer"]) for row in rows[name] if row["question_type"] == "digit"]
        same = draw.random() < 0.5
        shown = heard[1] if same else draw.choice([digit for digit in sorted(pictures) if digit != heard[1]])
        media = [{"type": "image", "path": draw.choice(pictures[shown])}, {"type": "audio", "path": name}]
        verdict = (MATCH, "yes" if same else "no")
        read = [(READ_PICTURE, shown), heard]
        draw.shuffle(read)
        turns = [[*read, verdict], [verdict, *read], [verdict], [verdict]][number % 4]
        yield conversation(f"match-{number}", media, turns)


def neighbours(digits: list[int]) -> list[Turn]:
    """Every question for the digit after or before another one of a clip."""
    pairs = list(pairwise(digits))
    after = [(f"Which digit comes after the {one}?", str(other)) for one, other in pairs]
    return after + [(f"Which digit comes before the {other}?", str(one)) for one, other in pairs]


def order_lessons(draw: random.Random) -> Iterator[dict[str, object]]:
    """A clip of three digits: which is where in their order, and at last all of them."""
    clips = [rows for rows in rows_of("clips").values() if not rows[0]["shown"]["way"]]
    for number in range(LESSONS["order"]):
        rows = draw.choice(clips)
        digits = rows[0]["shown"]["digits"]
        asked = {row["question_type"]: (row["question"], row["answer"]) for row in rows}
        # Behind the other answers the list could be put together from their words, so it is asked alone.
        turns = [asked["list"]]
        if number % LIST_ALONE:
            ends = [asked["first"], asked["last"]]
            turns = [draw.choice(ends), *draw.sample(neighbours(digits), 2)]
            draw.shuffle(turns)
        yield conversation(f"order-{number}", [{"type": "video", "path": rows[0]["video"]}], turns)


def way_lessons(draw: random.Random) -> Iterator[dict[str, object]]:
    """A clip of one digit that moves: which digit, and which way."""
    clips = [rows for rows in rows_of("clips").values() if rows[0]["shown"]["way"]]
    for number in range(LESSONS["way"]):
        rows = draw.choice(clips)
        turns = [(row["question"], row["answer"]) for row in rows]
        draw.shuffle(turns)
        yield conversation(f"way-{number}", [{"type": "video", "path": rows[0]["video"]}], turns)


def scene_lessons(draw: random.Random) -> Iterator[dict[str, object]]:
    """A scene and questions that the base was trained on."""
    dialogues = script("make_dialogues")
    known = dialogues.questions_by_image("train")
    for number in range(LESSONS["scene"]):
        image = draw.choice(list(known))
        asked = [turn for turn in known[image] if turn[0] != dialogues.CAPTION_PROMPT]
        chosen = draw.sample(asked, min(TURNS, len(asked)))
        # A caption would give the other answers away, so it comes last.
        captions = [turn for turn in known[image] if turn[0] == dialogues.CAPTION_PROMPT]
        chosen += draw.sample(captions, number % 2)
        yield conversation(f"scene-{number}", [{"type": "image", "path": f"{image:012d}.png"}], chosen)


def write_lessons(path: Path) -> None:
    """Write all lessons in an order of their own."""
    draw = random.Random(0)
    kinds = (sound_lessons, match_lessons, order_lessons, way_lessons, scene_lessons)
    lessons = [lesson for kind in kinds for lesson in kind(draw)]
    draw.shuffle(lessons)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(lesson) + "\n" for lesson in lessons), encoding="utf-8")


def main() -> None:
    """Write the file given by ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs" / "omni" / "lessons.jsonl")
    write_lessons(parser.parse_args().out)


if __name__ == "__main__":
    main()
