"""Short runs over real pictures with three questions each, so that rows train as packed trees; stopped in every way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from mmtune.recipe import Build, Finetune, Model, Recipe, Source, Tokenize
from mmtune.stages.build_data import build_data
from mmtune.stages.tokenize import tokenize
from mmtune.talk import Talk

# Of like length, also by one wording: rows of them alone are not packed to save padding.
QUESTIONS = ("How many digits are in the picture?", "What color is behind the digits?", "Is there a 7 in the picture?")
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
    base, build = Model(path=str(model)), Build(templates="first")
    return Recipe(run_dir=folder, model=base, sources=tuple(sources), build=build, finetune=wish)


def made_tokens(folder: Path, repository: Path, model: Path, layout: str = "tree") -> Path:
    """Builds instructions/ and tokens/ in a folder; returns tokens/."""
    recipe = tree_recipe(folder, repository, model).model_copy(update={"tokenize": Tokenize(layout=layout)})
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


_RECORD = """
import os
if "RANK" in os.environ:
    from tests.stages.tree_runs import record
    record({folder!r}, setattr)
"""


def record(folder: Path | str, put: Callable[[Any, str, Any], None]) -> None:
    """Lets the loop write the example ids that this process trains on, by step, into a folder."""
    from mmtune.training import loop

    accumulate, refuse = loop.Loop.accumulate, loop.refuse_non_finite
    own: list[str] = []

    def watched(run: Any, chosen: Any) -> Any:
        shares = run.plan.shares(chosen, run.accelerator.process_index, run.accelerator.num_processes)
        own[:] = [example for at, counts in shares if counts for example in run.hooks.ids(chosen[at])]
        return accumulate(run, chosen)

    def refused(losses: Any, norm: Any, chosen: Any, *, step: int, **more: Any) -> None:
        refuse(losses, norm, chosen, step=step, **more)
        with open(Path(folder) / f"ids-{os.getpid()}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps([step, own]) + "\n")

    put(loop.Loop, "accumulate", watched)
    put(loop, "refuse_non_finite", refused)


def ids_by_step(folder: Path) -> dict[int, list[str]]:
    """The ids that ``record`` wrote, of all processes, sorted."""
    found: dict[int, list[str]] = {}
    for file in folder.glob("ids-*.jsonl"):
        for step, own in map(json.loads, file.read_text().splitlines()):
            found[step] = sorted([*found.get(step, []), *own])
    return found


def started(recipe: Recipe, *flags: str, first: str = "", recorded: Path | None = None) -> subprocess.Popen[str]:
    """Starts ``mmtune finetune`` on a recipe.

    Args:
        recipe: The recipe; it is written into its run_dir.
        flags: Of the command.
        first: Python code that runs before it, in the same process.
        recorded: Where launched processes ``record``.
    """
    path = recipe.run_dir / "recipe.json"
    path.write_text(recipe.model_dump_json())
    arguments = ["finetune", str(path), *flags]
    run = ["-m", "mmtune", *arguments]
    if first:
        run = ["-c", f"{first}\nfrom mmtune.__main__ import main\nmain()", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if recorded is not None:
        # Python imports a module of this name in every process, those of a launcher among them.
        recorded.mkdir(parents=True, exist_ok=True)
        (recorded / "sitecustomize.py").write_text(_RECORD.format(folder=str(recorded)))
        roots = [str(recorded), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, roots))
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
