"""Saving says nothing: the stage speaks."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SAVES = """
import sys
from transformers import ViTConfig, ViTModel
from mmtune.models.save import save_model
config = ViTConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
save_model(ViTModel(config), sys.argv[1])
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
