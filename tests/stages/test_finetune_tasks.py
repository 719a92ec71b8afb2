"""finetune by tasks: weights of 1 change nothing, each task's loss stands by its name, and resume is exact."""

import json
import shutil

import pytest
from accelerate.state import AcceleratorState

from mmtune.errors import Interrupted, RecipeError
from mmtune.recipe import Finetune, Model, Recipe, Source
from mmtune.stages.build_data import build_data
from mmtune.stages.finetune import finetune
from mmtune.stages.tokenize import tokenize
from mmtune.talk import Talk

ONES = {"vqa": 1.0, "caption": 1.0}


def recipe_at(folder, repository, model, **settings):
    data = repository / "data" / "scenes"
    images = {split: str(data / split) for split in ("train", "val")}
    sources = [
        Source(
            id="compare",
            reader="vqa_v2",
            split=split,
            questions=str(data / "annotations" / f"compare_{split}_questions.json"),
            annotations=str(data / "annotations" / f"compare_{split}_annotations.json"),
            images=images[split],
            limit=6,
        )
        for split in ("train", "val")
    ]
    sources += [
        Source(
            id="said",
            reader="coco_captions",
            split=split,
            annotations=str(data / "annotations" / f"captions_{split}.json"),
            images=images[split],
            limit=6,
        )
        for split in ("train", "val")
    ]
    common = {"batch_rows": 4, "max_steps": 5, "learning_rate": 0.01, "log_every": 1, "lora": {"r": 2}}
    finetune_settings = Finetune.model_validate({**common, **settings})
    return Recipe(run_dir=folder, model=Model(path=str(model)), sources=tuple(sources), finetune=finetune_settings)


@pytest.fixture(scope="module")
def made(tmp_path_factory, repository, tiny_vlm):
    folder = tmp_path_factory.mktemp("made")
    recipe = recipe_at(folder, repository, tiny_vlm)
    build_data(recipe, console=Talk(quiet=True))
    tokenize(recipe, console=Talk(quiet=True))
    return folder


@pytest.fixture
def fresh(made, tmp_path, repository, tiny_vlm):
    """A function from settings to a recipe over the same rows."""
    AcceleratorState._reset_state()
    for stage in ("instructions", "tokens"):
        shutil.copytree(made / stage, tmp_path / stage)
    yield lambda **settings: recipe_at(tmp_path, repository, tiny_vlm, **settings)
    AcceleratorState._reset_state()


def run(recipe):
    finetune(recipe, force=True, console=Talk(quiet=True))
    text = (recipe.run_dir / "adapter" / "metrics.jsonl").read_text()
    own = ("loss", "val_loss", "grad_norm")
    return [
        {name: value for name, value in json.loads(line).items() if name.startswith(own)} for line in text.splitlines()
    ]


def test_each_task_stands_by_its_name_and_ones_change_nothing(fresh):
    plain, ones, weighed = run(fresh()), run(fresh(task_weights=ONES)), run(fresh(task_weights={"vqa": 0.25}))
    tasks = {f"loss_task_{name}" for name in ONES}
    assert not any("task" in name for line in plain for name in line)
    assert tasks <= set().union(*ones) and {f"val_{name}" for name in tasks} <= set(ones[-1])
    for line, other in zip(plain, ones, strict=True):
        assert {name: other[name] for name in line} == pytest.approx(line, rel=1e-5)
    # The first step is that of the same weights.
    first = {name: ones[0][name] for name in tasks}
    assert {name: weighed[0][name] for name in tasks} == pytest.approx(first)
    vqa, caption = first["loss_task_vqa"], first["loss_task_caption"]
    share = (ones[0]["loss"] - caption) / (vqa - caption)
    assert 0 < share < 1
    assert weighed[0]["loss"] == pytest.approx(0.25 * share * vqa + (1 - share) * caption, rel=1e-4)


def test_stopped_and_resumed_it_says_the_same(fresh, monkeypatch):
    from mmtune.training import loop

    recipe = fresh(task_weights={"vqa": 0.5}, log_every=2)
    whole = run(recipe)
    polls = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_stop_wanted", lambda stop, accelerator: next(polls))
        with pytest.raises(Interrupted):
            run(recipe)
    assert run(recipe) == whole


def test_a_task_without_rows_is_named(fresh):
    with pytest.raises(RecipeError, match="task_weights names the task vqq"):
        run(fresh(task_weights={"vqq": 2.0}))
