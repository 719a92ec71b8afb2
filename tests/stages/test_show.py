"""show says what a run has, also when its training stopped in the middle."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmtune.errors import DataError, IntegrityError
from mmtune.recipe.text import load_recipe
from mmtune.stages.build_data import build_data
from mmtune.stages.doctor import _states
from mmtune.stages.show import describe, render
from mmtune.storage import open_stage
from mmtune.talk import Talk
from mmtune.training.checkpoints import CheckpointFolder


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_training_that_stopped_is_named(tmp_path: Path, command: str) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints" / command, keep=2)
    for step in (20, 40):
        folder.save(step, {"trainable": {"a": torch.zeros(2)}}, "", {})
    found = describe(tmp_path)
    assert found["stages"] == {} and found[f"{command}_stopped_after_step"] == 40
    assert f"{command:13} not finished; the newest checkpoint is after step 40" in render(found)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished stage"):
        describe(tmp_path)
    with pytest.raises(DataError, match="nope does not exist"):
        describe(tmp_path / "nope")


def test_a_part_of_a_stage_names_the_stage(tmp_path: Path) -> None:
    (tmp_path / "features" / "text").mkdir(parents=True)
    (tmp_path / "features" / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="is a part of a stage") as error:
        describe(tmp_path / "features" / "text")
    assert error.value.hint == f"mmtune show {tmp_path / 'features'}"


def test_doctor_names_an_extra_once() -> None:
    found = [("prompt", "cma", True), ("prompt", "optuna", False), ("audio", "soundfile", True), ("fast", "x", False)]
    extras = [{"extra": extra, "module": module, "present": present} for extra, module, present in found]
    assert _states(extras) == {"prompt": "without optuna", "audio": "ok", "fast": "-"}


def test_a_damaged_file_of_any_stage_is_named(tmp_path: Path) -> None:
    with open_stage(tmp_path / "report", stage="eval", config={}) as staging:
        for name in ("index.html", "train/data.txt", "val/data.txt"):
            (staging.path / name).parent.mkdir(exist_ok=True)
            (staging.path / name).write_text("whole")
        staging.publish(facts={"metrics": {}})
    assert describe(tmp_path / "report")["stage"] == "eval"
    (tmp_path / "report" / "index.html").write_text("wHole")
    with pytest.raises(IntegrityError, match=r"index\.html does not have the recorded bytes") as error:
        describe(tmp_path / "report")
    assert error.value.hint == "run: mmtune eval --force"


def test_a_row_of_instructions_names_files_and_items(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    asked = [{"type": "image"}, {"type": "behaviour", "behaviour": ["318", "50"]}, {"type": "text", "text": "Which?"}]
    answer = {"role": "assistant", "content": "The cat."}
    row = {"images": ["cat.png"], "messages": [{"role": "user", "content": asked}, answer]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (tmp_path / "recipe.yaml").write_text("run_dir: run\nsources: [{id: s, reader: messages, path: rows.jsonl}]\n")
    build_data(load_recipe(tmp_path / "recipe.yaml", environ={}), console=Talk(quiet=True))
    text = render(describe(tmp_path / "run" / "instructions"))
    assert "  user      '<image: cat.png><behaviour: 318, 50>Which?'" in text


def test_facts_are_told_in_words() -> None:
    facts = {
        "towers": {
            "llm": {"state": "lora", "parameters": 1024},
            "vision": {"state": "frozen"},
            "audio": {"state": "absent"},
        },
        "val_loss": None,
        "notes": [],
        "loss": 0.123456789,
        "exact": True,
        "kinds": ["image", "text"],
    }
    stage = {"path": "p", "stage": "finetune", "bytes": 0, "hash": "h", "rows": {}, "drops": {}, "facts": facts}
    assert render(stage).splitlines()[1:] == [
        "towers    llm (state lora, parameters 1,024), vision (state frozen)",
        "loss      0.123457",
        "exact     yes",
        "kinds     image, text",
    ]


def test_no_name_with_a_comma_runs_into_the_next_and_no_score_is_cut() -> None:
    scores = {f"tuned, choice_{letter}": 10.0 + at for at, letter in enumerate("abcdefghij")}
    facts = {"scores": {"exact_match": {"tuned": 40.0, **scores}}, "sources": [{"id": "easy", "path": "x" * 90}] * 2}
    stage = {"path": "p", "stage": "eval", "bytes": 0, "hash": "h", "rows": {"test": 200}, "drops": {}, "facts": facts}
    lines = render(stage).splitlines()[2:]
    assert lines[:4] == ["scores", "  exact_match", "    tuned           40", "    tuned, choice_a 10"]
    assert lines[12] == "    tuned, choice_j 19"
    assert lines[13:] == ["sources", *[f"  - id easy, path {'x' * 90}"] * 2]
    two = {**stage, "facts": {"scores": {"wer": {"base": 1.5, "tuned": 0.5}}}}
    assert render(two).splitlines()[2:] == ["scores    wer (base 1.5, tuned 0.5)"]


def test_trees_are_not_taken_for_rows() -> None:
    tokens = {"rows": {"train": 189, "val": 1, "test": 5}, "drops": {}, "hash": "h"}
    tokens["facts"] = {"examples": {"train": 200, "val": 1, "test": 1300}}
    said = "train 189 trees of 200 rows, val 1, test 5 trees of 1,300 rows"
    run = {"stages": {"tokens": tokens}, "pretrain_stopped_after_step": None, "finetune_stopped_after_step": None}
    assert render(run) == f"tokens        h  {said}"
    assert render({**tokens, "path": "p", "stage": "tokenize", "bytes": 0}).splitlines()[1:] == [f"rows      {said}"]


def test_a_prompts_last_rows_go_by_the_name_of_their_split() -> None:
    facts = {"scores": {"best": {"dev": {"value": 50.0}, "test": {"value": 40.0}}}, "test_split": "val"}
    stage = {"path": "p", "stage": "prompt", "bytes": 0, "hash": "h", "drops": {}, "rows": {"dev": 16, "test": 40}}
    assert render({**stage, "facts": facts}).splitlines()[1:] == [
        "rows      dev 16, val 40",
        "scores    best (dev (value 50), val (value 40))",
    ]
