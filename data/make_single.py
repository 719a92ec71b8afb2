"""Write which bundled scenes show one digit alone, and what it is: what ``recipes/prompt_retrieval.yaml`` plays with.

One JSON line per picture, from the captions files of ``make_scenes.py``::

    {"id": "3", "image": "000000000003.png", "digit": "6", "color": "red", "corner": "top left", "background": "gray"}

Run from anywhere::

    python data/make_single.py
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

ANNOTATIONS = Path(__file__).parent / "scenes" / "annotations"
SPLITS = ("train", "test")


def single(split: str) -> Iterator[dict[str, str]]:
    """The pictures of a split with one digit."""
    document = json.loads((ANNOTATIONS / f"captions_{split}.json").read_text("utf-8"))
    for image in document["images"]:
        digits = image["scene"]["digits"]
        if len(digits) == 1:
            facts = {name: str(digits[0][name]) for name in ("digit", "color", "corner")}
            background = image["scene"]["background"]
            yield {"id": str(image["id"]), "image": image["file_name"], **facts, "background": background}


def main() -> None:
    """Write one file per split, without a time stamp."""
    for split in SPLITS:
        text = "".join(json.dumps(row) + "\n" for row in single(split))
        (ANNOTATIONS / f"single_{split}.jsonl.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
