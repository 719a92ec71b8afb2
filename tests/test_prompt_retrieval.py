"""The recipe of exemplars: after training with them, the nearest help more than random ones, those more than none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_nearest_exemplars_beat_random_ones_and_these_beat_none(repository: Path, tmp_path: Path):
    settings = {"run_dir": tmp_path / "run", "eval.loss": "false"}
    overrides = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    recipe = str(repository / "recipes" / "prompt_retrieval.yaml")
    command = [sys.executable, "-m", "mmtune", "run", recipe, "--json", "--offline", "-q", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    entry = json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())["metrics"]["exact_match"]
    scores = {name: one["value"] for name, one in entry["models"].items()}
    assert list(scores) == ["vote, 4 retrieval", "tuned", "tuned, 4 random", "tuned, 4 retrieval"], found
    steps = {(one["first"], one["second"]): one for one in entry["steps"]}
    # One word of sixteen fits where nothing says which game is played.
    assert scores["tuned"] < 15
    assert steps["tuned", "tuned, 4 random"]["low"] > 0
    # Three runs: 38.7 to 49.3, 44.5 to 55.3 in the middle.
    assert steps["tuned, 4 random", "tuned, 4 retrieval"]["low"] > 25
