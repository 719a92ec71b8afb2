"""What a person sees of a training run: the towers, the course before step 1, one live line, the speed at the end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from datasets import load_from_disk

from mmtune.stages.finetune import finetune
from mmtune.talk import Talk
from mmtune.training.meter import meter_note
from tests.stages.tree_runs import made_tokens, tree_recipe


@pytest.fixture
def said(tmp_path: Path, repository: Path, tiny_vlm: Path, capfd: Any) -> tuple[Path, str]:
    AcceleratorState._reset_state()
    made_tokens(tmp_path, repository, tiny_vlm)
    capfd.readouterr()
    finetune(tree_recipe(tmp_path, repository, tiny_vlm, eval_every=4, warmup=2), console=Talk(every_seconds=0.0))
    AcceleratorState._reset_state()
    return tmp_path, capfd.readouterr().err


def test_a_run_says_what_it_will_do_and_what_it_does(said: tuple[Path, str]) -> None:
    folder, text = said
    course = dict(re.findall(r"^(\w[\w ]*?) +│ +(.*?) *$", text[text.index("the course") :], re.MULTILINE))
    # Ten pictures with three questions each, six rows per step.
    assert course["rows"].startswith("30") and course["steps"] == "6 in 1.2 epochs"
    answers = sum(label != -100 for labels in load_from_disk(folder / "tokens")["train"]["labels"] for label in labels)
    assert course["effective batch"] == f"6 rows with {answers / 5:,.0f} answer tokens on average"
    assert course["learning rate"] == "0.01, cosine after 2 steps of warm-up"
    tokens = json.loads((folder / "tokens" / "manifest.json").read_text())["facts"]
    saved = 1 - tokens["tokens"] / tokens["tokens_apart"]
    assert saved > 0.2 and any("saved by sharing" in line for line in course.values())
    assert re.fullmatch(r"1 on [a-z]+", course["processes"]), "of a device no number: every process has its own"
    assert {"processes", "memory at its peak", "time"} <= course.keys()
    assert re.search(r"llm +│ lora", text) and re.search(r"vision +│ frozen", text)
    lines = re.findall(
        r"finetune \d/6 rate=.*/s eta=\d\d:\d\d:\d\d loss=[\d.]+ lr=\S+ rows/s=\d+ tokens/s=\d+ waiting=\d+%", text
    )
    assert len(lines) == 6, "a line per step"
    assert re.search(r"finetune: [\d.,]+ rows/s", text)
    rows = [json.loads(row) for row in (folder / "adapter" / "metrics.jsonl").read_text().splitlines()]
    assert re.findall(r"step (\d), val loss (\S+)", text) == [("4", f"{rows[3]['val_loss']:.4f}")]
    for row in (folder / "adapter" / "metrics.jsonl").read_text().splitlines():
        assert 0 <= json.loads(row)["wait_share"] <= 1


def test_the_live_line_names_the_use_of_a_gpu() -> None:
    row = {"loss": 1.5, "learning_rate": 1e-4, "rows_per_second": 12.4, "tokens_per_second": 900.2, "wait_share": 0.034}
    assert meter_note(row) == "loss=1.5000 lr=1.00e-04 rows/s=12 tokens/s=900 waiting=3%"
    assert meter_note({**row, "mfu": 0.412}) == "loss=1.5000 lr=1.00e-04 rows/s=12 tokens/s=900 MFU=41% waiting=3%"
