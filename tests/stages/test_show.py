"""show says what a run has, also when its training stopped in the middle."""

from pathlib import Path

import pytest
import torch

from mmtune.errors import DataError
from mmtune.stages.doctor import _states
from mmtune.stages.show import describe, render
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
