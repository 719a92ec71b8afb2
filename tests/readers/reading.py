"""Tiny files, and what a reader makes of them."""

import json
from pathlib import Path

from mmtune.readers import find_reader
from mmtune.readers.source import SourceFiles
from mmtune.records import Reject


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
