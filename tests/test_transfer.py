"""The bundled base is worth having: from few rows, LoRA on it beats the same model started at random."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Six whole runs; a busy machine needs more than the usual limit.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
SEEDS = (0, 1, 2)
SCRATCH = ("finetune.from_scratch=true", "finetune.method=full", "finetune.train=[vision,projector,llm]")


@pytest.fixture(scope="module")
def recipe(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's held-out task alone, its training rows and its test."""
    notes = repository / "data" / "scenes" / "annotations"
    sources = [
        {
            "id": "compare",
            "reader": "vqa_v2",
            "split": split,
            "questions": str(notes / f"compare_{split}_questions.json"),
            "annotations": str(notes / f"compare_{split}_annotations.json"),
            "images": str(repository / "data" / "scenes" / split),
            "template": "vqa_plain",
        }
        for split in ("train", "test")
    ]
    settings = {
        "model": {"path": str(repository / "data" / "base")},
        "sources": sources,
        "finetune": {
            "lora": {"r": 32, "alpha": 32},
            "train": ["projector", "llm"],
            "learning_rate": 2e-3,
            "max_steps": 150,
            "batch_rows": 32,
        },
        "eval": {"split": "test", "compare": ["tuned"], "max_new_tokens": 4, "batch_rows": 64, "bootstrap": 100},
    }
    path = tmp_path_factory.mktemp("transfer") / "recipe.yaml"
    path.write_text(json.dumps(settings))
    return path


def accuracy(recipe: Path, name: str, *settings: str) -> float:
    """Runs the recipe with some settings of its own and returns the tuned model's held-out accuracy."""
    folder = recipe.parent / name
    overrides = [word for setting in (f"run_dir={folder}", *settings) for word in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, "-m", "mmtune", "run", str(recipe), *overrides],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((folder / "report" / "metrics.json").read_text())
    return report["metrics"]["vqa_accuracy"]["models"]["tuned"]["value"]


def test_few_rows_teach_the_base_more_than_a_random_start(recipe: Path) -> None:
    from_base = [accuracy(recipe, f"base-{seed}", f"seed={seed}") for seed in SEEDS]
    scratch = [accuracy(recipe, f"scratch-{seed}", f"seed={seed}", *SCRATCH) for seed in SEEDS]
    assert min(from_base) > max(scratch), (from_base, scratch)
    assert sum(from_base) / len(SEEDS) > sum(scratch) / len(SEEDS) + 5, (from_base, scratch)
