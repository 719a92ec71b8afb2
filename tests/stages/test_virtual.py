"""What virtual tokens start from: the labels of the training rows, as the rows themselves say them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmtune.encoding.processor import load_processor, tokenizer_of
from mmtune.errors import DataError
from mmtune.models.load import load_model
from mmtune.recipe import Recipe
from mmtune.stages.build_data import build_data
from mmtune.stages.finetune import finetune
from mmtune.stages.finetune.virtual import labels_of
from mmtune.stages.tokenize import tokenize
from mmtune.talk import Talk

QUIET = Talk(quiet=True)


def built(folder: Path, rows: list[dict], columns: dict, **settings) -> Recipe:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"id": "s", "reader": "table", "split": "train", "path": str(path), "columns": columns}
    recipe = Recipe(run_dir=folder / "run", sources=[source], build={"workers": 1}, **settings)
    build_data(recipe, console=QUIET)
    return recipe


def labels(folder: Path, rows: list[dict], columns: dict) -> tuple[str, ...]:
    return labels_of(built(folder, rows, columns).run_dir / "instructions" / "train")


def test_labels_are_the_options_or_else_the_commonest_answers(tmp_path: Path):
    rows = [{"q": f"row {at}", "a": "no" if at % 3 else "yes"} for at in range(9)]
    (tmp_path / "a").mkdir()
    assert labels(tmp_path / "a", rows, {"text": "q", "answer": "a", "options": "=yes|no|maybe"}) == (
        "yes",
        "no",
        "maybe",
    )
    (tmp_path / "b").mkdir()
    assert labels(tmp_path / "b", rows, {"text": "q", "answer": "a"}) == ("no", "yes")


def test_rows_without_classes_have_no_labels(tmp_path: Path):
    rows = [{"q": f"row {at}", "a": f"a sentence of row {at}"} for at in range(4)]
    with pytest.raises(DataError, match="no answer comes twice") as error:
        labels(tmp_path, rows, {"text": "q", "answer": "a"})
    assert error.value.code == "no_labels" and "vocabulary" in error.value.hint


def test_a_tuned_prompt_began_at_the_labels_of_its_rows(tmp_path: Path, tiny_vlm: Path):
    rows = [{"q": f"is row {at} red", "a": ("red", "not blue")[at % 2]} for at in range(8)]
    settings = {
        "model": {"path": str(tiny_vlm)},
        "finetune": {
            "method": "prompt",
            "virtual_tokens": 3,
            "soft_prompt": {"init": "labels"},
            "max_steps": 1,
            "learning_rate": 1e-9,
            "batch_rows": 4,
        },
    }
    recipe = built(tmp_path, rows, {"question": "q", "answer": "a", "options": "=red|not blue"}, **settings)
    tokenize(recipe, console=QUIET)
    finetune(recipe, console=QUIET)
    own = load_file(recipe.run_dir / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]
    table = load_model(str(tiny_vlm)).get_input_embeddings().weight
    tokenizer = tokenizer_of(load_processor(str(tiny_vlm)))
    for vector, label in zip(own, ("red", "not blue"), strict=False):
        ids = tokenizer(label, add_special_tokens=False)["input_ids"]
        assert torch.allclose(vector, table[ids].mean(0), atol=1e-6)
    assert any(torch.allclose(own[2], other, atol=1e-6) for other in table)
