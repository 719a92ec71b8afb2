"""Write the bundled pairs: a picture and a sound of a digit each, asked about together.

No medium is made here: pictures are those of ``scenes`` that show one digit alone, sounds those of ``sounds``, each
split of its own, so scans and voices of val and test are unseen. Two questions:

- ``twin``: both are of the same digit, 0 to 9. "Which digit is it?" Either alone tells.
- ``agree``: each is of a zero or a one, all four pairs equally often. "Are the two digits the same?" Neither alone
  tells: it is the exclusive or of the two.

Run from anywhere; the same bundled data give the same files::

    python data/make_pairs.py
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
ROWS = {"train": 960, "val": 80, "test": 160}
"""Rows of either question."""
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTIONS = {"twin": "Which digit is it?", "agree": "Are the two digits the same?"}

Row = dict[str, str]


def pictures_by_digit(split: str) -> dict[int, list[str]]:
    """Pictures that show one digit alone, by that digit."""
    text = (HERE / "scenes" / "annotations" / f"captions_{split}.json").read_text(encoding="utf-8")
    found: dict[int, list[str]] = defaultdict(list)
    for image in json.loads(text)["images"]:
        digits = image["scene"]["digits"]
        if len(digits) == 1:
            found[digits[0]["digit"]].append(image["file_name"])
    return found


def sounds_by_digit(split: str) -> dict[int, list[str]]:
    """Sounds by the digit that is said."""
    names = sorted(path.name for path in (HERE / "sounds" / split).glob("*.flac"))
    return {digit: [name for name in names if name.startswith(f"{word}_")] for digit, word in enumerate(WORDS)}


def rows_of(kind: str, split: str) -> Iterator[Row]:
    """The rows of a question and split, drawn from their own seed."""
    draw = random.Random(f"{kind} {split}")
    pictures, sounds = pictures_by_digit(split), sounds_by_digit(split)
    for number in range(ROWS[split]):
        if kind == "twin":
            seen = heard = number % len(WORDS)
            answer = str(seen)
        else:
            seen, heard = number % 2, number // 2 % 2
            answer = "yes" if seen == heard else "no"
        yield {
            "id": f"{kind}/{split}/{number}",
            "question": QUESTIONS[kind],
            "answer": answer,
            "image": draw.choice(pictures[seen]),
            "audio": draw.choice(sounds[heard]),
        }


def main() -> None:
    """Write the annotation files below the folder given by ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "pairs" / "annotations")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for kind in QUESTIONS:
        for split in ROWS:
            text = "".join(json.dumps(row) + "\n" for row in rows_of(kind, split))
            # Without a time and a name inside, the same rows are the same bytes.
            (out / f"{kind}_{split}.jsonl.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
