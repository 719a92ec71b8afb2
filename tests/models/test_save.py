"""Saving says nothing: the stage speaks. It writes the same bytes whenever it is done."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SAVES = """
import sys
from pathlib import Path
from transformers import ViTConfig, ViTModel
from mmtune.models.save import save_model
config = ViTConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
save_model(ViTModel(config), Path(sys.argv[1]))
"""


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed finds the GPU")
def test_deepspeed_is_not_heard_without_a_gpu(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", SAVES, tmp_path], env=environ, capture_output=True, text=True, check=True
    )
    assert (tmp_path / "model.safetensors").is_file()
    assert done.stdout + done.stderr == ""


ADAPTER = """
import sys
from pathlib import Path
from peft import LoraConfig, get_peft_model
from transformers import ViTConfig, ViTModel
from mmtune.models.save import save_model
config = ViTConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
names = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
save_model(get_peft_model(ViTModel(config), LoraConfig(target_modules=names)), Path(sys.argv[1]))
"""


def test_an_adapters_config_has_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    for seed in "12":
        environ = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", ADAPTER, tmp_path / seed], env=environ, capture_output=True, check=True)
    one, other = ((tmp_path / seed / "adapter_config.json").read_bytes() for seed in "12")
    assert one == other
    assert json.loads(one)["target_modules"] == ["fc1", "fc2", "k_proj", "o_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize("code", [SAVES, ADAPTER])
def test_weights_may_be_read_by_whom_the_config_may(tmp_path: Path, code: str) -> None:
    """A server often runs as another user than who trained; a umask that says otherwise is heeded."""
    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        folder = tmp_path / oct(umask)
        subprocess.run([sys.executable, "-c", code, folder], capture_output=True, check=True, umask=umask)
        assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {mode}
