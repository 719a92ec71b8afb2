"""Write data/scenes/annotations/left_<split>.jsonl: a picture and its left digit, without any question.

The rows are those of the official files that ask which digit is the left one. Nothing in a row says what is
wanted: the base model can read that digit and is not told to, which is what a soft prompt is for. Run from anywhere::

    python data/make_left.py

The same bundled scenes give the same files.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

FOLDER = Path(__file__).parent / "scenes" / "annotations"
QUESTION = "Which digit is the left digit?"
ROWS = {"train": 1000, "test": 400}


def rows(split: str) -> list[tuple[str, str]]:
    """File name and answer of the first pictures that are asked the question."""
    with gzip.open(FOLDER / f"base_{split}_questions.json.gz", "rt", encoding="utf-8") as stream:
        asked = {row["question_id"] for row in json.load(stream)["questions"] if row["question"] == QUESTION}
    with gzip.open(FOLDER / f"base_{split}_annotations.json.gz", "rt", encoding="utf-8") as stream:
        found = [
            (f"{row['image_id']:012d}.png", row["multiple_choice_answer"])
            for row in json.load(stream)["annotations"]
            if row["question_id"] in asked
        ]
    return sorted(found)[: ROWS[split]]


def main() -> None:
    """Write both files."""
    for split in ROWS:
        lines = [json.dumps(row) + "\n" for row in rows(split)]
        (FOLDER / f"left_{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
