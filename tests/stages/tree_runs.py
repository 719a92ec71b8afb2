"""Short runs over real pictures with three questions each, so that rows train as packed trees; stopped in every way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from mmtune.recipe import Finetune, Model, Recipe, Source
from mmtune.stages.build_data import build_data
from mmtune.stages.tokenize import tokenize
from mmtune.talk import Talk

QUESTIONS = ("How many digits are in the picture?", "What is the background color?", "Is there a 7?")
ANSWERS = ("2", "black", "no")
AS_TREES = "rows that share media train as one tree"
COMMON = {"batch_rows": 6, "max_steps": 6, "learning_rate": 0.01, "log_every": 1, "save_every": 2}
ONCE = {"features": {"use": "off"}, "lora": {"r": 2, "dropout": 0.1}}


def tree_recipe(folder: Path, repository: Path, model: Path, **settings: Any) -> Recipe:
    """A recipe over ten training and four held-out pictures with three questions each."""
    scenes, sources = repository / "data" / "scenes" / "train", []
    pictures = sorted(scenes.glob("*.png"))
    for split, some in (("train", pictures[:10]), ("val", pictures[10:14])):
        rows = [
            {"image": picture.name, "question": question, "answer": answer}
            for picture in some
            for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
        ]
        folder.mkdir(parents=True, exist_ok=True)
        table = folder / f"{split}.jsonl"
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        columns = {name: name for name in ("image", "question", "answer")}
        sources.append(
            Source(id=split, reader="table", split=split, path=str(table), images=str(scenes), columns=columns)
        )
    wish = Finetune.model_validate({**COMMON, **ONCE, **settings})
    return Recipe(run_dir=folder, model=Model(path=str(model)), sources=tuple(sources), finetune=wish)


def made_tokens(folder: Path, repository: Path, model: Path) -> Path:
    """Builds instructions/ and tokens/ in a folder; returns tokens/."""
    recipe = tree_recipe(folder, repository, model)
    build_data(recipe, console=Talk(quiet=True))
    tokenize(recipe, console=Talk(quiet=True))
    return folder / "tokens"


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics of a finished run."""
    return [json.loads(line) for line in (folder / "adapter" / "metrics.jsonl").read_text().splitlines()]


def numbers_of(folder: Path) -> list[list[Any]]:
    """What a line of metrics says but its speed."""
    speed = {"rows_per_second", "tokens_per_second", "wait_share"}
    return [[(name, value) for name, value in line.items() if name not in speed] for line in lines_of(folder)]


def started(recipe: Recipe, *flags: str, first: str = "") -> subprocess.Popen[str]:
    """Starts ``mmtune finetune`` on a recipe, after the Python code ``first`` in the same process."""
    path = recipe.run_dir / "recipe.json"
    path.write_text(recipe.model_dump_json())
    arguments = ["finetune", str(path), *flags]
    run = ["-m", "mmtune", *arguments]
    if first:
        run = ["-c", f"{first}\nfrom mmtune.__main__ import main\nmain()", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *run], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(child: subprocess.Popen[str], code: int) -> str:
    """Waits for a run; returns what it said, once it has ended with a code."""
    _, talk = child.communicate(timeout=300)
    assert child.returncode == code, talk[-4000:]
    assert "Traceback" not in talk, talk[-4000:]
    return " ".join(talk.split())


def wait_for(path: Path, child: subprocess.Popen[str]) -> None:
    """Returns when a running child has made a file."""
    limit = time.monotonic() + 240
    while not path.exists() and child.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)
    assert child.poll() is None, child.communicate()[1][-4000:]
    assert path.exists()


def kill_all(child: subprocess.Popen[str]) -> None:
    """Kills a run and every process below it, without a word."""
    whole = psutil.Process(child.pid)
    for process in [whole, *whole.children(recursive=True)]:
        process.kill()
    child.communicate()


def state_of(recipe: Recipe, step: int) -> Path:
    """The file that a checkpoint is whole with."""
    return recipe.run_dir / "checkpoints" / "finetune" / f"step-{step:08d}" / "state.json"
