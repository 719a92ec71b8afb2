"""Rows of a search, and what a searched prompt shows: a copy of a picture is the picture itself."""

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from mmtune.files import write_json
from mmtune.prompts.schema import row_to_example
from mmtune.prompts.searched import SCHEMA, SearchedPrompt, prompt_facts
from mmtune.recipe import Recipe
from mmtune.records import Example
from mmtune.stages.build_data import build_data
from mmtune.stages.prompt.rows import choose_rows
from mmtune.storage import open_split, read_manifest
from mmtune.talk import Talk

QUIET = Talk(quiet=True)
COLORS = ("red", "blue")


def written(folder: Path, count: int) -> list[dict]:
    """Writes pictures, each a second time under another name, a row for every file, and returns the sources."""
    (folder / "media").mkdir()
    rows = []
    for at in range(count):
        names = [f"{word}-{at}.png" for word in ("first", "again")]
        pixels = np.random.default_rng(at).integers(0, 255, (16, 16, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "media" / names[0])
        shutil.copy(folder / "media" / names[0], folder / "media" / names[1])
        rows += [{"i": name, "q": "what color", "a": COLORS[at % 2]} for name in names]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"question": "q", "answer": "a", "image": "i"}
    entry = {"reader": "table", "path": str(path), "images": str(folder / "media"), "columns": columns}
    return [{"id": split, "split": split, **entry} for split in ("train", "val")]


def rows_of(recipe: Recipe, split: str) -> list[Example]:
    return [row_to_example(row) for row in open_split(recipe.run_dir / "instructions" / split).to_pylist()]


def number(example: Example) -> str:
    return example.media[-1].path.rpartition("-")[2]


def test_rows_of_the_pool_show_no_copy_of_a_dev_rows_picture(tmp_path: Path):
    recipe = Recipe.model_validate({"run_dir": tmp_path / "run", "sources": written(tmp_path, 12)})
    build_data(recipe, console=QUIET)
    folder = recipe.run_dir / "instructions"
    rows = choose_rows(folder, read_manifest(folder), sources=(), dev=6, pool=40, test=4, test_split="val")
    dev, pool = {number(one) for one in rows.dev}, {number(one) for one in rows.pool}
    assert not dev & pool and len(dev | pool) == 12
    assert len(rows.pool) == 2 * len(pool)


def test_dev_and_test_rows_are_of_every_source_where_one_was_cut(tmp_path: Path):
    path, columns = tmp_path / "rows.jsonl", {"question": "q", "answer": "a"}
    path.write_text("".join(json.dumps({"q": f"question {at}?", "a": COLORS[at % 2]}) + "\n" for at in range(400)))
    entry = {"reader": "table", "path": str(path), "columns": columns}
    sources = [
        {"id": f"{name}-{split}", "split": split, **entry, **limit}
        for name, limit in (("cut", {"limit": 20}), ("whole", {}))
        for split in ("train", "val")
    ]
    recipe = Recipe.model_validate({"run_dir": tmp_path / "run", "sources": sources, "build": {"workers": 1}})
    build_data(recipe, console=QUIET)
    folder = recipe.run_dir / "instructions"
    rows = choose_rows(folder, read_manifest(folder), sources=(), dev=42, pool=42, test=42, test_split="val")
    for some in (rows.dev, rows.pool, rows.test):
        assert 1 <= sum(one.source.startswith("cut") for one in some) <= 3


def test_a_row_of_a_copied_picture_is_not_shown_its_solution(tmp_path: Path):
    sources = written(tmp_path, 4)
    recipe = Recipe.model_validate({"run_dir": tmp_path / "run", "sources": sources})
    build_data(recipe, console=QUIET)
    solved = rows_of(recipe, "train")[0]
    facts = prompt_facts(SearchedPrompt("{prompt}", (solved,)))
    root = read_manifest(recipe.run_dir / "instructions").facts["media_root"]
    write_json(tmp_path / "prompt.json", {"schema": SCHEMA, "prompt": facts, "media_root": root})
    worded = recipe.model_copy(
        update={
            "run_dir": tmp_path / "worded",
            "build": recipe.build.model_copy(update={"prompt": str(tmp_path / "prompt.json")}),
        }
    )
    build_data(worded, console=QUIET)
    for split in ("train", "val"):
        rows = rows_of(worded, split)
        assert len(rows) == 8
        assert [bool(row.exemplar_ids) for row in rows] == [number(row) != number(solved) for row in rows]
    # The mixture parts what a searched prompt shows, in training rows alone.
    mixture = {**worded.build.model_dump(), "mixture": {"delimiters": 1.0}}
    parted = Recipe.model_validate({**worded.model_dump(), "run_dir": tmp_path / "parted", "build": mixture})
    build_data(parted, console=QUIET)
    for split in ("train", "val"):
        own = [bool(row.exemplar_ids) and split == "train" for row in rows_of(parted, split)]
        assert ["delimiters" in row.metadata for row in rows_of(parted, split)] == own
    counts = read_manifest(parted.run_dir / "instructions").facts["mixture"]["delimiters"]
    assert sum(counts.values()) == 6 and "turns" not in counts
