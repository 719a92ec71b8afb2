"""Checkpoints are whole or not there; older ones go only after the new one verifies."""

import shutil
import subprocess
import sys

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


def test_a_damaged_one_is_an_error_that_offers_the_one_before(tmp_path):
    checkpoints = folder(tmp_path / "c")
    save(checkpoints, 1)
    save(checkpoints, 2)
    file = tmp_path / "c" / "step-00000002" / "trainable.safetensors"
    flipped = bytearray(file.read_bytes())
    flipped[-1] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(IntegrityError, match=r"trainable\.safetensors is missing or damaged") as caught:
        checkpoints.newest()
    assert "go on from step-00000001" in caught.value.hint
    (tmp_path / "c" / "step-00000001" / "state.json").unlink()
    with pytest.raises(IntegrityError) as caught:
        checkpoints.newest()
    assert caught.value.hint == "start again: mmtune finetune --resume never"
    shutil.rmtree(tmp_path / "c" / "step-00000002")
    save(checkpoints, 3)
    assert checkpoints.newest().step == 3
    checkpoints.clear()
    assert checkpoints.newest() is None


def test_no_byte_of_a_state_changes_unnoticed(tmp_path):
    checkpoints = folder(tmp_path / "c")
    checkpoints.save(20, {"trainable": {"w": torch.ones(2)}}, "", {"seed": 1}, {"nll": 2.5})
    file = tmp_path / "c" / "step-00000020" / "state.json"
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(IntegrityError):
            checkpoints.newest()
    file.write_bytes(whole)
    assert checkpoints.newest().sums == {"nll": 2.5}


def test_a_full_disk_leaves_the_checkpoints_before_as_they_were(tmp_path):
    """The system's own limit on the size of a file stands for a full disk."""
    work = """
import resource, signal, sys, torch
from pathlib import Path
from mmtune.errors import ResourceError
from mmtune.training.checkpoints import CheckpointFolder
checkpoints = CheckpointFolder(Path(sys.argv[1]), 1)
checkpoints.save(1, {"trainable": {"w": torch.ones(2)}}, "", {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoints.save(2, {"trainable": {"w": torch.ones(2)}, "optimizer": {"m": torch.ones(100_000)}}, "", {})
except ResourceError as error:
    print(error.exit_code, error.message)
print(checkpoints.newest().step)
"""
    done = subprocess.run(
        [sys.executable, "-c", work, str(tmp_path / "c")], capture_output=True, text=True, check=True, timeout=120
    )
    said, step = done.stdout.splitlines()
    assert said.startswith("5 the checkpoint of step 2 needs 400,008 bytes: ") and "optimizer.safetensors" in said
    assert step == "1"
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-00000001"]
