"""finetune by tasks and in stages: losses by name, towers that start frozen, and both go on exactly."""

import json
import re
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from pydantic import ValidationError
from safetensors.torch import load_file

from mmtune.errors import IntegrityError, Interrupted, RecipeError
from mmtune.models import liger
from mmtune.models.towers import tower_of
from mmtune.recipe import Finetune, Model, Recipe, Source
from mmtune.stages.build_data import build_data
from mmtune.stages.finetune import finetune
from mmtune.stages.finetune.course import few_steps
from mmtune.stages.tokenize import tokenize
from mmtune.talk import Talk

ONES = {"vqa": 1.0, "caption": 1.0}
STAGED = {"method": "full", "train": ["llm", "projector", "vision"], "unfreeze": {"vision": 1}, "warmup": 0}


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


def test_validation_looks_at_so_many_rows_every_so_many_steps(fresh):
    few, many = (run(fresh(eval_every=2, eval_rows=rows)) for rows in (1, 512))
    assert [line["loss"] for line in few] == [line["loss"] for line in many]
    judged = [at for at, line in enumerate(many, 1) if "val_loss" in line]
    assert judged == [at for at, line in enumerate(few, 1) if "val_loss" in line] and set(judged) >= {2, 4}
    assert all(few[at - 1]["val_loss"] != many[at - 1]["val_loss"] for at in judged)


def test_kernels_of_liger_are_asked_for_unless_the_recipe_says_off(fresh, monkeypatch):
    asked = []
    monkeypatch.setattr(liger, "use_liger", lambda model: asked.append(model) or False)
    run(fresh(liger="off", max_steps=1))
    assert not asked
    run(fresh(max_steps=1))
    assert len(asked) == 1


def test_stopped_and_resumed_it_says_the_same(fresh, monkeypatch):
    from mmtune.training import loop

    recipe = fresh(task_weights={"vqa": 0.5}, log_every=2)
    whole = run(recipe)
    polls = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "stop_wanted", lambda _: next(polls))
        with pytest.raises(Interrupted):
            run(recipe)
    assert run(recipe) == whole


def test_tokens_of_other_rows_are_refused(fresh):
    recipe = fresh(max_steps=1)
    build_data(recipe.model_copy(update={"seed": 1}), console=Talk(quiet=True))
    with pytest.raises(IntegrityError, match="tokens/ was made of other rows than instructions/ holds") as error:
        finetune(recipe, console=Talk(quiet=True))
    assert (error.value.code, error.value.hint) == ("other_rows", "run: mmtune tokenize")
    # Where a run foresees what it does, tokenize comes first.
    finetune(recipe, dry_run=True, console=Talk(quiet=True))
    shutil.rmtree(recipe.run_dir / "instructions")
    run(recipe)


def test_a_task_without_rows_is_named(fresh):
    with pytest.raises(RecipeError, match="task_weights names the task vqq"):
        run(fresh(task_weights={"vqq": 2.0}))


def tuned(recipe):
    console = Talk(quiet=True)
    finetune(recipe, force=True, console=console)
    return console.lines, load_file(recipe.run_dir / "adapter" / "model.safetensors")


def moved(weights, base):
    return {tower_of(name) for name, value in weights.items() if not torch.equal(value, base[name])}


def test_a_staged_tower_stands_still_until_its_epoch(fresh, tiny_vlm):
    base = load_file(tiny_vlm / "model.safetensors")
    said, _ = tuned(fresh(**STAGED, max_steps=1))
    (line,) = (line for line in said if "the vision tower" in line)
    assert "never trains" in line
    said, _ = tuned(fresh(**STAGED, epochs=2, max_steps=None))
    first = int(re.search(r"the vision tower trains from step (\d+) on", "\n".join(said)).group(1))
    assert first > 1
    for steps, moves in ((first - 1, False), (first, True)):
        _, weights = tuned(fresh(**STAGED, max_steps=steps))
        assert ("vision" in moved(weights, base)) == moves, steps
        assert "llm" in moved(weights, base)


def test_a_staged_run_that_stops_ends_with_the_same_bytes(fresh, monkeypatch):
    from mmtune.training import loop

    recipe = fresh(**STAGED, epochs=2, max_steps=None)
    said, whole = tuned(recipe)
    first = int(re.search(r"trains from step (\d+) on", "\n".join(said)).group(1))
    for stop in (first - 2, first):
        polls = iter([False] * stop + [True])
        with monkeypatch.context() as patch:
            patch.setattr(loop.Loop, "stop_wanted", lambda _, polls=polls: next(polls))
            with pytest.raises(Interrupted):
                tuned(recipe)
        said, again = tuned(recipe)
        assert any("resuming after step" in line for line in said)
        assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole), stop


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"unfreeze": {"llm": 1}}, "goes with method full"),
        ({"method": "full", "shard": "zero3", "train": ["llm", "vision"], "unfreeze": {"llm": 1}}, "not with shard"),
        ({"method": "full", "unfreeze": {"vision": 1}}, "vision, which does not train"),
        ({"method": "full", "unfreeze": {"llm": 1}}, "leave one out"),
    ],
)
def test_what_it_does_not_go_with_is_named(settings, said):
    with pytest.raises(ValidationError, match=said):
        Finetune.model_validate(settings)


@pytest.mark.parametrize(
    ("steps", "rows", "epochs", "micro_batches", "batch_rows", "said"),
    [
        (30, 9000, 1, 1, None, ""),
        (8, 300, 2, 1, None, "8 steps are few to learn from: finetune.batch_rows=16 makes 38 or more of them"),
        (1, 40, 2, 2, None, "1 step is few to learn from: finetune.batch_rows=4 makes 10 or more of them"),
        (2, 8, 1, 1, 4, "2 steps are few to learn from: raise finetune.epochs"),
        (2, 5, 1, 1, None, "2 steps are few to learn from: raise finetune.epochs"),
        (10, 320, 1, 1, 32, "10 steps are few to learn from: finetune.batch_rows=8 makes 40 or more of them"),
    ],
)
def test_few_steps_are_told_with_what_makes_more(steps, rows, epochs, micro_batches, batch_rows, said):
    assert few_steps(steps, rows, epochs, micro_batches, batch_rows) == said


def test_a_run_of_few_steps_says_so_and_one_of_a_given_number_does_not(fresh, capsys):
    finetune(fresh(max_steps=None, epochs=1, batch_rows=None), force=True, console=Talk())
    few = capsys.readouterr().err
    assert re.search(r"note: \d steps? (is|are) few to learn from", few)
    # Towers that the model has not are none of the table's rows.
    assert "vision" in few and "absent" not in few
    finetune(fresh(max_steps=2), force=True, console=Talk())
    assert "few to learn from" not in capsys.readouterr().err
