"""Real files of each named set go from their original layout to a report, with the bundled base."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

EASY = {"reader": "table", "columns": {"question": 0, "answer": 1, "image": "images/{2}.png"}}
DEMO = "llamafactory_demo"
VQA = "vqa_v2_subset/with_images"
COCO = "coco_captions_mini"
SETS: dict[str, list[dict[str, Any]]] = {
    "vqa_v2": [
        {
            "reader": "vqa_v2",
            "questions": f"{VQA}/v2_OpenEnded_mscoco_train2014_questions.json",
            "annotations": f"{VQA}/v2_mscoco_train2014_annotations.json",
            "images": f"{VQA}/train2014",
        }
    ],
    "coco_captions": [
        {
            "reader": "coco_captions",
            "annotations": f"{COCO}/annotations/captions_val2017.json",
            "images": f"{COCO}/val2017",
        }
    ],
    "easy_vqa": [{**EASY, "path": "easy_vqa/test/questions.json"}],
    "chartqa": [{"reader": "chartqa", "path": "chartqa/test_human.json"}],
    "llamafactory_demo": [
        {"reader": "messages", "path": f"{DEMO}/mllm_demo.json"},
        {"reader": "messages", "path": f"{DEMO}/v1_sft_demo.jsonl"},
        {"reader": "messages", "path": f"{DEMO}/v1_multimodal_demo.jsonl", "columns": {"strip": "data/"}},
        {"reader": "alpaca", "path": f"{DEMO}/alpaca_en_demo.json"},
        {"reader": "sharegpt", "path": f"{DEMO}/glaive_toolcall_en_demo.json"},
    ],
}


@pytest.mark.parametrize("name", SETS)
def test_original_files_become_a_report(name: str, repository: Path, shared_datasets: Path, tmp_path: Path) -> None:
    paths = ("path", "questions", "annotations", "images")
    sources = [
        {key: str(shared_datasets / value) if key in paths else value for key, value in source.items()}
        | {"id": f"{name}-{number}-{split}", "split": split, "limit": 12}
        for number, source in enumerate(SETS[name])
        for split in ("train", "test")
    ]
    recipe = {
        "run_dir": "run",
        "model": {"path": str(repository / "data" / "base")},
        "sources": sources,
        "tokenize": {"max_length": 4096},
        "finetune": {"max_steps": 2, "batch_rows": 4, "learning_rate": 1e-3},
        "eval": {"split": "test", "limit": 8, "max_new_tokens": 4, "bootstrap": 100},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    done = subprocess.run(
        [sys.executable, "-m", "mmtune", "run", str(path), "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["ok"]
    report = json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())
    rows = list(map(json.loads, (tmp_path / "run" / "report" / "predictions.jsonl").read_text().splitlines()))
    assert [row["model"] for row in rows].count("tuned") == len(rows) // 2 == 8
    for metric in report["metrics"].values():
        assert set(metric["models"]) == {"base", "tuned"}
