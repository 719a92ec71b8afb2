"""Tokens of a few scenes, and recipes that finetune on them."""

import os
import shutil
import subprocess
import sys

import psutil
import pytest
from accelerate.state import AcceleratorState

from mmtune.recipe import Finetune, Model, Recipe, Source
from mmtune.stages.build_data import build_data
from mmtune.stages.tokenize import tokenize
from mmtune.talk import Talk


def recipe_at(folder, repository, model, **settings):
    notes = repository / "data" / "scenes" / "annotations"
    source = Source(
        id="compare",
        reader="vqa_v2",
        questions=str(notes / "compare_train_questions.json"),
        annotations=str(notes / "compare_train_annotations.json"),
        images=str(repository / "data" / "scenes" / "train"),
        limit=12,
    )
    common = {"batch_rows": 4, "max_steps": 3, "learning_rate": 0.01, "log_every": 1, "lora": {"r": 2}}
    finetune_settings = Finetune.model_validate({**common, **settings})
    return Recipe(run_dir=folder, model=Model(path=str(model)), sources=(source,), finetune=finetune_settings)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, repository, tiny_vlm):
    folder = tmp_path_factory.mktemp("made")
    recipe = recipe_at(folder, repository, tiny_vlm)
    build_data(recipe, console=Talk(quiet=True))
    tokenize(recipe, console=Talk(quiet=True))
    return folder / "tokens"


@pytest.fixture
def own_precision():
    """Accelerate keeps the precision of the first run of a process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.fixture
def fresh(tokens, tmp_path, repository, tiny_vlm):
    """A function from settings to a recipe over the same tokens."""
    shutil.copytree(tokens, tmp_path / "tokens")

    def make(**settings):
        return recipe_at(tmp_path, repository, tiny_vlm, **settings)

    return make


@pytest.fixture
def two(fresh, tmp_path):
    """A function from settings to a started run on two processes."""
    children = []

    def start(**settings):
        path = tmp_path / "recipe.yaml"
        path.write_text(fresh(**settings).model_dump_json())
        command = [sys.executable, "-m", "mmtune", "finetune", str(path), "--cpu-processes", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        children.append(child)
        return child

    yield start
    for child in children:
        if child.poll() is None:
            for process in [*psutil.Process(child.pid).children(recursive=True), child]:
                process.kill()
