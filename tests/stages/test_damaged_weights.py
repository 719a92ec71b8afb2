"""A model whose weights are no numbers: every stage that asks it says so, and makes nothing of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmtune.errors import DivergedError, IntegrityError
from mmtune.recipe import Recipe
from mmtune.stages.build_data import build_data
from mmtune.stages.evaluate import evaluate
from mmtune.stages.extract import extract
from mmtune.stages.prompt import prompt as search_prompt
from mmtune.talk import Talk

QUIET = Talk(quiet=True)


@pytest.fixture
def recipe(tmp_path: Path, tiny_vlm: Path):
    model = tmp_path / "model"
    shutil.copytree(tiny_vlm, model)
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "mlp" in name)
    weights[name] = torch.full_like(weights[name], torch.nan)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    for split in ("train", "val"):
        rows = [{"q": f"the {split} number {at} is", "a": ("red", "yellow")[at % 2]} for at in range(16)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**settings) -> Recipe:
        columns = {"text": "q", "answer": "a", "options": "=red|yellow"}
        sources = [
            {"id": "t", "reader": "table", "split": split, "path": str(tmp_path / f"{split}.jsonl"), "columns": columns}
            for split in ("train", "val")
        ]
        made = Recipe(
            run_dir=tmp_path / "run", model={"path": str(model)}, sources=sources, build={"workers": 1}, **settings
        )
        build_data(made, console=QUIET)
        return made

    return make


@pytest.mark.parametrize("answer", ["rank", "generate"])
def test_eval_answers_nothing(recipe, answer: str):
    made = recipe(eval={"compare": ["base"], "answer": answer, "loss": False})
    with pytest.raises(IntegrityError, match="base gives probabilities that are no numbers"):
        evaluate(made, console=QUIET)
    assert not (made.run_dir / "report").exists()


@pytest.mark.parametrize("answer", ["rank", "generate"])
@pytest.mark.parametrize("reward", ["metric", "gap", "likelihood"])
def test_no_prompt_is_searched(recipe, answer: str, reward: str):
    settings = {"method": "random", "budget": 60, "dev": 8, "minibatch": 4, "test": 4, "reward": reward}
    made = recipe(prompt=settings, eval={"compare": ["base"], "answer": answer})
    with pytest.raises((IntegrityError, DivergedError), match=r"no numbers|reward of a prompt is nan") as error:
        search_prompt(made, console=QUIET)
    assert error.value.exit_code in (6, 7) and not (made.run_dir / "prompt").exists()


def test_no_features_are_kept(recipe):
    made = recipe(extract={"modalities": ["text"], "encoders": {"text": "base"}, "workers": 1})
    with pytest.raises(IntegrityError, match="gives no finite numbers for any of 32") as error:
        extract(made, console=QUIET)
    assert error.value.exit_code == 7 and not (made.run_dir / "features").exists()
