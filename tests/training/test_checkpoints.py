"""Checkpoints are whole or not there; older ones go only after the new one verifies."""

import pytest
import torch

from mmtune.errors import IntegrityError
from mmtune.training.checkpoints import CheckpointFolder


def folder(path, keep=2):
    return CheckpointFolder(path, keep)


def save(checkpoints, step):
    checkpoints.save(step, {"trainable": {"w": torch.full((2,), float(step))}}, f"{step}\n", {"seed": 1})


def test_the_newest_comes_back(tmp_path):
    checkpoints = folder(tmp_path / "c")
    assert checkpoints.newest() is None
    for step in (10, 20, 100):
        save(checkpoints, step)
    newest = checkpoints.newest()
    assert newest.step == 100 and newest.identity == {"seed": 1}
    assert checkpoints.load(newest, "trainable")["w"].tolist() == [100.0, 100.0]
    assert checkpoints.metrics(newest) == "100\n"
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step-00000020", "step-00000100"]


def test_a_damaged_one_is_passed_over_and_all_damaged_is_an_error(tmp_path):
    checkpoints = folder(tmp_path / "c")
    save(checkpoints, 1)
    save(checkpoints, 2)
    (tmp_path / "c" / "step-00000002" / "trainable.safetensors").write_bytes(b"x")
    assert checkpoints.newest().step == 1
    (tmp_path / "c" / "step-00000001" / "state.json").unlink()
    with pytest.raises(IntegrityError):
        checkpoints.newest()
    checkpoints.clear()
    assert checkpoints.newest() is None
