"""Write runs/base/dialogues.jsonl: the base's own lessons, one multi-turn conversation per line.

Each line shows one bundled scene and asks several of its questions in random order. Half of the
lessons only look things up (which digit, what color): reading has to be there before what builds
upon it. The others draw from all questions and captions. Questions, answers and captions are those
of the official files in ``data/scenes/annotations``; only their arrangement is made here. The base
learns them much faster in this form, since one picture is looked at once for all of its questions.
Run from anywhere::

    python data/make_dialogues.py

The same bundled scenes give the same file.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
CAPTION_PROMPT = "Write a short caption for this image."
LOOKUPS = ("Which digit is the", "What digit is", "What color is the", "What is the color")
PER_SCENE = 10
TURNS = 5


def questions_by_image(split: str) -> dict[int, list[tuple[str, str]]]:
    """Questions with answers, and captions, by image id."""
    folder = HERE / "scenes" / "annotations"
    with gzip.open(folder / f"base_{split}_questions.json.gz", "rt", encoding="utf-8") as stream:
        questions = {row["question_id"]: row for row in json.load(stream)["questions"]}
    found: dict[int, list[tuple[str, str]]] = defaultdict(list)
    with gzip.open(folder / f"base_{split}_annotations.json.gz", "rt", encoding="utf-8") as stream:
        for row in json.load(stream)["annotations"]:
            asked = questions[row["question_id"]]["question"]
            found[row["image_id"]].append((asked, row["multiple_choice_answer"]))
    captions = json.loads((folder / f"captions_{split}.json").read_text(encoding="utf-8"))
    for row in captions["annotations"]:
        found[row["image_id"]].append((CAPTION_PROMPT, row["caption"]))
    return found


def dialogue(identifier: str, image: str, pairs: list[tuple[str, str]]) -> dict[str, object]:
    """One conversation in the `messages` form; the picture stands in its first turn."""
    messages = []
    for index, (question, answer) in enumerate(pairs):
        content: list[dict[str, str]] = [{"type": "image", "path": image}] if index == 0 else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"id": identifier, "messages": messages}


def main() -> None:
    """Write the file given by ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs" / "base" / "dialogues.jsonl")
    arguments = parser.parse_args()
    draw = random.Random(0)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with open(arguments.out, "w", encoding="utf-8") as stream:
        for image_id, pairs in questions_by_image("train").items():
            for copy in range(PER_SCENE):
                lookups = [pair for pair in pairs if pair[0].startswith(LOOKUPS)] if copy % 2 else pairs
                chosen = draw.sample(lookups, min(TURNS, len(lookups)))
                # A caption would give the other answers away, so it comes last.
                chosen.sort(key=lambda pair: pair[0] == CAPTION_PROMPT)
                row = dialogue(f"{image_id}-{copy}", f"{image_id:012d}.png", chosen)
                stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
