"""The recipe of soft prompts: vectors alone tell a frozen base which of the things that it can do is wanted."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest


def run(repository: Path, folder: Path, method: str) -> dict[str, float]:
    """Runs the recipe with a method; returns the exact match of held-out pictures by answerer and source."""
    settings = {"run_dir": folder, "eval.loss": "false", "finetune.method": method}
    overrides = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    recipe = str(repository / "recipes" / "prompt_soft.yaml")
    command = [sys.executable, "-m", "mmtune", "run", recipe, "--json", "--offline", "-q", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sources = json.loads((folder / "report" / "metrics.json").read_text())["groups"]["source"]
    models = {source: one["exact_match"]["models"] for source, one in sources.items()}
    return {f"{name} {source}": one["value"] for source, found in models.items() for name, one in found.items()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("method", "least"), [("prompt", 0.70), ("prefix", 0.85)])
def test_a_soft_prompt_selects_a_task_of_the_frozen_base(repository: Path, tmp_path: Path, method: str, least: float):
    weights = repository / "data" / "base" / "model.safetensors"
    before = hashlib.sha256(weights.read_bytes()).hexdigest()
    scores = run(repository, tmp_path / "run", method)
    # Told in words the base can do it, told nothing it says something else.
    assert scores["base left_told"] > 90 and scores["base left"] < 10, scores
    # On this machine 96 with either method.
    assert scores["tuned left"] >= least * scores["base left_told"], scores
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == before
