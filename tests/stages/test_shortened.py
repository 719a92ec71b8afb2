"""tokenize.too_long: shorten, from raw rows to the report: only contexts lose words, and it is counted."""

import json
from pathlib import Path

import pytest

from mmtune.recipe import Recipe
from mmtune.stages.build_data import build_data
from mmtune.stages.evaluate import evaluate
from mmtune.stages.prompt import prompt as search_prompt
from mmtune.stages.tokenize import tokenize
from mmtune.storage import open_split, read_manifest
from mmtune.talk import Talk

MOST = 160


@pytest.fixture
def recipe(tmp_path: Path, tiny_vlm: Path):
    """Rows of 15 to 240 words of context; every fourth training row has its answer in the last words alone."""
    for split, count in (("train", 16), ("val", 6)):
        rows = []
        for at in range(count):
            words = ["it is said"] * (5 + 5 * at + (40 if split == "val" else 0))
            words.insert(len(words) if at % 4 == 3 else 1, f"that place {at} is {('red', 'blue')[at % 2]}")
            rows.append({"q": f"Which colour is place {at}?", "c": " ".join(words), "a": ("red", "blue")[at % 2]})
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"question": "q", "context": "c", "answer": "a", "options": "=red|blue"}
    sources = [
        {"id": "t", "reader": "table", "split": split, "path": str(tmp_path / f"{split}.jsonl"), "columns": columns}
        for split in ("train", "val")
    ]
    (tmp_path / "t.yaml").write_text("t:\n  - ['{context}\n\n{question} {options}', '{answer}']\n")
    return Recipe.model_validate(
        {
            "run_dir": tmp_path / "run",
            "model": {"path": str(tiny_vlm)},
            "sources": [{**one, "templates": str(tmp_path / "t.yaml")} for one in sources],
            "build": {"workers": 1},
            "tokenize": {"max_length": MOST, "too_long": "shorten", "workers": 1, "layout": "rows"},
            "prompt": {"method": "random", "budget": 40, "dev": 4, "test": 6, "minibatch": 2},
            "eval": {"compare": ["base", "best_prompt"], "answer": "rank", "bootstrap": 100},
        }
    )


def test_contexts_lose_their_ends_and_rows_without_their_answer_are_refused(recipe, tiny_vlm: Path):
    from transformers import AutoTokenizer

    build_data(recipe, console=Talk(quiet=True))
    talk = Talk(quiet=True)
    result = tokenize(recipe, console=talk)
    rows = [row for split in ("train", "val") for row in open_split(recipe.run_dir / "tokens" / split).to_pylist()]
    facts = read_manifest(recipe.run_dir / "tokens").facts
    assert result["drops"] == {"answer_cut": 3}
    assert facts["contexts_shortened"] > 3 and any("contexts" in line and "cut to fit" in line for line in talk.lines)
    tokenizer, full = AutoTokenizer.from_pretrained(tiny_vlm), 0
    for row in rows:
        number = int(row["example_ids"][0].rpartition("-")[2])
        text = tokenizer.decode(row["input_ids"])
        assert row["length"] <= MOST and f"Which colour is place {number}? red, blue" in text
        assert f"that place {number} is {('red', 'blue')[number % 2]}" in text
        full += row["length"] > MOST - 8
    # What is cut is cut by words, to the last that fits.
    assert full >= facts["contexts_shortened"]


def test_a_search_and_a_report_ask_what_fits_and_say_so(recipe):
    build_data(recipe, console=Talk(quiet=True))
    search_prompt(recipe, console=Talk(quiet=True))
    evaluate(recipe, console=Talk(quiet=True))
    report = json.loads((recipe.run_dir / "report" / "metrics.json").read_text())
    assert report["n"] == 6 and report["rejected"] == {}
    assert any("contexts of" in note and "cut to fit" in note for note in report["notes"]), report["notes"]
    assert not any("does not fit" in note for note in report["notes"])
