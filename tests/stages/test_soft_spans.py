"""Soft tokens inside a template, from recipe to report."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from mmtune.errors import RecipeError
from mmtune.recipe import Recipe
from mmtune.stages.build_data import build_data
from mmtune.stages.evaluate import evaluate
from mmtune.stages.finetune import finetune
from mmtune.stages.show import describe
from mmtune.stages.tokenize import tokenize
from mmtune.talk import Talk

QUIET = Talk(quiet=True)
TEXT = "Which digit is the left digit?"


@pytest.fixture
def recipe(tmp_path, repository, tiny_vlm):
    AcceleratorState._reset_state()
    notes = repository / "data" / "scenes" / "annotations"
    (tmp_path / "t.yaml").write_text("mine:\n  - ['{soft: 4} {media}{soft: 2}', '{answer}']\n")

    def make(**finetuned) -> Recipe:
        sources = [
            {
                "id": "left",
                "reader": "table",
                "split": split,
                "path": str(notes / f"left_{name}.jsonl"),
                "images": str(repository / "data" / "scenes" / name),
                "columns": {"image": 0, "answer": 1},
                "templates": str(tmp_path / "t.yaml"),
                "limit": 6,
            }
            for split, name in (("train", "train"), ("val", "test"))
        ]
        return Recipe(
            run_dir=tmp_path / "run",
            model={"path": str(tiny_vlm)},
            sources=sources,
            build={"workers": 1},
            finetune={"max_steps": 2, "batch_rows": 3, "learning_rate": 0.05, "lora": {"r": 2}, **finetuned},
            eval={"metrics": ["exact_match"], "bootstrap": 100, "max_new_tokens": 2},
        )

    yield make
    AcceleratorState._reset_state()


def embeddings(folder, text):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    ids = AutoProcessor.from_pretrained(folder).tokenizer(text, add_special_tokens=False)["input_ids"]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.get_input_embeddings()(torch.tensor(ids))


def test_from_recipe_to_report(recipe, tiny_vlm):
    made = recipe(method="prompt", soft_prompt={"init": "text", "text": TEXT}, learning_rate=1e-9)
    build_data(made, console=QUIET)
    tokenize(made, console=QUIET)
    texts = [run["text"] for run in describe(made.run_dir / "tokens")["row"]["runs"]]
    assert any("[4 soft tokens]" in text for text in texts) and any("[2 soft tokens]" in text for text in texts)
    finetune(made, console=QUIET)
    found = load_file(made.run_dir / "adapter" / "soft_tokens.safetensors")["weight"]
    # With a rate of nothing they are still the words that they started from.
    assert torch.allclose(found, embeddings(tiny_vlm, TEXT)[:6], atol=1e-5)
    evaluate(made, console=QUIET)
    lines = (made.run_dir / "report" / "predictions.jsonl").read_text().splitlines()
    assert {json.loads(line)["model"] for line in lines} == {"base", "tuned"} and len(lines) == 12
    # LoRA trains them beside its adapters, from the same tokens.
    both = recipe(method="lora", soft_prompt={"init": "vocabulary", "learning_rate": 0.1})
    finetune(both, console=QUIET, force=True)
    assert {file.name for file in (both.run_dir / "adapter").glob("*.safetensors")} == {
        "adapter_model.safetensors",
        "soft_tokens.safetensors",
    }
    with pytest.raises(RecipeError, match="method prefix does not train"):
        finetune(recipe(method="prefix"), console=QUIET, force=True)
    with pytest.raises(RecipeError, match="do not go with"):
        finetune(recipe(method="lora", offload=True), console=QUIET, force=True)
