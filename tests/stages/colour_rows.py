"""Rows about pictures of one colour, and rows of words, for tests of exemplars."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from mmtune.prompts.schema import row_to_example
from mmtune.recipe import Recipe
from mmtune.records import Example
from mmtune.stages import build_data as build_stage
from mmtune.stages.extract import extract
from mmtune.storage import open_split
from mmtune.talk import Talk

QUIET = Talk(quiet=True)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
WORDS = ("red", "blue", "green")
COLORS = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (30, 200, 30)}


def pictures(folder: Path, name: str, count: int, split: str = "train", per_picture: int = 2, **more) -> dict:
    """Writes pictures of one colour each, asked about several times, and returns the recipe's entry."""
    rows = []
    for at in range(count):
        word = WORDS[at % len(WORDS)]
        file = f"{name}-{split}-{at}.png"
        (folder / "media").mkdir(exist_ok=True)
        dice = np.random.default_rng([at, len(name), ord(split[0])])
        noise = dice.integers(-25, 25, (24, 24, 3))
        Image.fromarray((np.array(COLORS[word]) + noise).clip(0, 255).astype(np.uint8)).save(folder / "media" / file)
        rows += [{"i": file, "q": f"what color is {name} {at}, time {time}", "a": word} for time in range(per_picture)]
    path = folder / f"{name}-{split}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"question": "q", "answer": "a", "image": "i"}
    entry = {"id": name, "reader": "table", "split": split, "path": str(path), "images": str(folder / "media")}
    return {**entry, "columns": columns, "template": "vqa_plain", **more}


def make(folder: Path, sources: list[dict], run: str = "run", **sections) -> Recipe:
    build = {"workers": 1, **sections.pop("build", {})}
    settings = {"modalities": ["image"], "encoders": {"image": {"config": SMALL, "pool": "stats"}}, "workers": 1}
    settings |= sections.pop("extract", {})
    return Recipe(run_dir=folder / run, sources=sources, build=build, extract=settings, **sections)


def built(recipe: Recipe, *, again: bool = True) -> list[Example]:
    if again:
        extract(recipe, console=QUIET)
    build_stage.build_data(recipe, console=QUIET)
    return rows_of(recipe)


def rows_of(recipe: Recipe) -> list[Example]:
    folder = recipe.run_dir / "instructions"
    splits = [split for split in ("train", "val", "test") if (folder / split).is_dir()]
    return [row_to_example(row) for split in splits for row in open_split(folder / split).to_pylist()]


def retrieval(**more) -> dict:
    return {"exemplars": {"method": "retrieval", "k": 3, **more}}


def media_of(example: Example) -> list[str]:
    return [medium.path for medium in example.media]


def texts(folder: Path, count: int, split: str) -> dict:
    """Writes texts without media, one of them twice, and returns the recipe's entry."""
    rows = [{"q": f"is {WORDS[at % 3]} number {at // 2 * 2} fine", "a": ("yes", "no")[at % 2]} for at in range(count)]
    rows.append({**rows[0], "a": "no"})
    path = folder / f"t-{split}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"text": "q", "answer": "a", "options": "=yes|no"}
    return {
        "id": "t",
        "reader": "table",
        "split": split,
        "path": str(path),
        "columns": columns,
        "task": "sentiment_analysis",
    }
