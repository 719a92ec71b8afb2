"""The four stages through the command line, on bundled scenes: once, again, killed, and on two processes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmtune.storage import open_split, read_manifest

pytestmark = pytest.mark.slow


def mmtune(*arguments, check=None, **settings):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mmtune", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=500,
        **settings,
    )
    if check is not None:
        assert done.returncode == check, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, repository, tiny_vlm) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    notes = repository / "data" / "scenes" / "annotations"
    sources = [
        {
            "id": "compare",
            "reader": "vqa_v2",
            "split": split,
            "questions": str(notes / f"compare_{split}_questions.json"),
            "annotations": str(notes / f"compare_{split}_annotations.json"),
            "images": str(repository / "data" / "scenes" / split),
            "limit": 24,
        }
        for split in ("train", "test")
    ]
    settings = {
        "run_dir": str(folder / "run"),
        "seed": 3,
        "model": {"path": str(tiny_vlm)},
        "sources": sources,
        "tokenize": {"max_length": 200},
        "finetune": {
            "lora": {"r": 4, "dropout": 0.1},
            "learning_rate": 0.01,
            "batch_rows": 4,
            "max_steps": 14,
            "save_every": 3,
            "log_every": 1,
        },
        "eval": {"split": "test", "max_new_tokens": 3, "limit": 10, "bootstrap": 100},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(settings))
    mmtune("run", path, check=0)
    return path


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_dir(recipe):
    return recipe.parent / "run"


def fresh_run(recipe, name):
    """A run folder of its own with the same tokens."""
    target = recipe.parent / name
    for stage in ("instructions", "tokens"):
        shutil.copytree(run_dir(recipe) / stage, target / stage)
    return target


def adapter_bytes(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_every_stage_is_there_and_nothing_is_lost(recipe):
    folder = run_dir(recipe)
    for stage in ("instructions", "tokens", "adapter", "report"):
        read_manifest(folder / stage, verify=True)
    assert read_manifest(folder / "instructions").rows == {"train": 24, "test": 24}
    tokens = read_manifest(folder / "tokens")
    assert sum(tokens.facts["examples"].values()) + sum(tokens.drops.values()) == 48
    assert not (folder / "checkpoints").exists()
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) == [
        "adapter",
        "features",
        "instructions",
        "report",
        "tokens",
    ]
    losses = json_lines(folder / "adapter" / "metrics.jsonl")
    assert [row["step"] for row in losses] == list(range(1, 15))
    assert losses[-1]["loss"] < losses[0]["loss"]


def test_a_second_run_does_nothing_and_says_so(recipe):
    before = {p: p.stat().st_mtime_ns for p in run_dir(recipe).rglob("*") if p.is_file() and p.suffix != ".lock"}
    done = mmtune("run", recipe, "--json", check=0)
    result = json.loads(done.stdout)
    assert result["ok"] and all(stage["cached"] for stage in result["stages"].values())
    after = {p: p.stat().st_mtime_ns for p in before}
    assert before == after


def test_changed_training_settings_are_refused(recipe):
    done = mmtune("finetune", recipe, "--set", "finetune.learning_rate=0.5", "--json", check=7)
    error = json.loads(done.stdout)["error"]
    assert "learning_rate: 0.01 -> 0.5" in error["message"] and error["hint"]
    assert "Traceback" not in done.stderr


def kill_at(step, command, folder):
    """Starts a run and kills all of its processes when a checkpoint is there."""
    child = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    wanted = folder / "checkpoints" / "finetune" / f"step-{step:08d}" / "state.json"
    limit = time.monotonic() + 240
    while not wanted.exists() and child.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)
    assert child.poll() is None, "it ended before it could be killed"
    for process in [*psutil.Process(child.pid).children(recursive=True), psutil.Process(child.pid)]:
        process.kill()
    child.wait()


def test_killed_in_the_middle_it_ends_with_the_same_bytes(recipe):
    folder = fresh_run(recipe, "killed")
    command = [sys.executable, "-m", "mmtune", "finetune", str(recipe), "--set", f"run_dir={folder}"]
    for checkpoint in (3, 9):
        kill_at(checkpoint, command, folder)
        assert not (folder / "adapter").exists()
    done = mmtune("finetune", recipe, "--set", f"run_dir={folder}", check=0)
    assert "resuming after step" in done.stderr
    assert adapter_bytes(folder) == adapter_bytes(run_dir(recipe))


def test_two_processes_killed_twice_end_with_the_same_bytes(recipe):
    unbroken, killed = fresh_run(recipe, "two-unbroken"), fresh_run(recipe, "two-killed")
    common = ["--set", "finetune.batch_rows=2", "--set", "finetune.max_steps=9", "--cpu-processes", "2"]
    mmtune("finetune", recipe, *common, "--set", f"run_dir={unbroken}", check=0)
    again = [sys.executable, "-m", "mmtune", "finetune", str(recipe), *common, "--set", f"run_dir={killed}"]
    for step in (3, 6):
        kill_at(step, again, killed)
    done = mmtune("finetune", recipe, *common, "--set", f"run_dir={killed}", check=0)
    assert "resuming after step" in done.stderr
    assert adapter_bytes(killed) == adapter_bytes(unbroken)


def test_it_goes_on_with_smaller_micro_batches(recipe):
    """Half the rows at a time and twice as often: the same examples in every step."""
    unbroken, smaller = fresh_run(recipe, "whole"), fresh_run(recipe, "smaller")
    common = ["--set", "finetune.lora.dropout=0", "--set", "finetune.max_steps=8"]
    mmtune("finetune", recipe, *common, "--set", f"run_dir={unbroken}", check=0)
    target = ["--set", f"run_dir={smaller}"]
    kill_at(3, [sys.executable, "-m", "mmtune", "finetune", str(recipe), *common, *target], smaller)
    half = ["--set", "finetune.batch_rows=2", "--set", "finetune.batch_tokens=4096"]
    done = mmtune("finetune", recipe, *common, *target, *half, check=7)
    assert "step_size.batch_rows" in done.stderr and "its steps go on with finetune.accumulate=2" in done.stderr
    done = mmtune("finetune", recipe, *common, *target, *half, "--set", "finetune.accumulate=2", check=0)
    assert re.search(r"resuming after step [3-7] of 8", done.stderr)
    losses = [[row["loss"] for row in json_lines(f / "adapter" / "metrics.jsonl")] for f in (unbroken, smaller)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_polite_stop_saves_and_exits_75(recipe):
    folder = fresh_run(recipe, "stopped")
    command = [sys.executable, "-m", "mmtune", "finetune", str(recipe), "--set", f"run_dir={folder}"]
    child = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    wanted = folder / "checkpoints" / "finetune" / "step-00000003" / "state.json"
    while not wanted.exists() and child.poll() is None:
        time.sleep(0.005)
    child.send_signal(signal.SIGTERM)
    _, talk = child.communicate(timeout=120)
    assert child.returncode == 75, talk[-2000:]
    assert "state is saved" in talk and "Traceback" not in talk
    mmtune("finetune", recipe, "--set", f"run_dir={folder}", check=0)
    assert adapter_bytes(folder) == adapter_bytes(run_dir(recipe))


def test_two_processes_take_the_same_steps(recipe):
    """Two processes of two rows are one of four: same loss and nearly the same weights."""
    one, two = fresh_run(recipe, "one"), fresh_run(recipe, "two")
    common = ["--set", "finetune.lora.dropout=0", "--set", "finetune.max_steps=6"]
    common += ["--set", "finetune.batch_rows=2"]
    mmtune("finetune", recipe, *common, "--set", f"run_dir={one}", "--set", "finetune.accumulate=2", check=0)
    done = mmtune("finetune", recipe, *common, "--set", f"run_dir={two}", "--cpu-processes", 2, check=0)
    assert "nproc_per_node 2" in done.stderr
    losses = [[row["loss"] for row in json_lines(f / "adapter" / "metrics.jsonl")] for f in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    first, second = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (one, two))
    for name, value in first.items():
        assert torch.allclose(value, second[name], rtol=1e-3, atol=1e-4), name


def test_two_nodes_and_four_processes_take_the_same_steps(recipe):
    """Global batches of four rows: two machines of one process that share the weights, and one machine of four."""
    nodes, four = fresh_run(recipe, "nodes"), fresh_run(recipe, "four")
    common = ["--set", "finetune.lora.dropout=0", "--set", "finetune.max_steps=4", "--json"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "mmtune", "finetune", str(recipe), *common, "--set", f"run_dir={nodes}"]
    command += ["--set", "finetune.batch_rows=2", "--nodes", "2", "--cpu-processes", "1", "--rendezvous", place]
    command += ["--set", "finetune.shard=zero3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    machines = [
        subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    said = [machine.communicate(timeout=300) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert sorted(bool(out) for out, _ in said) == [False, True], "only the first process of all prints its result"
    assert all("--nnodes 2" in talk for _, talk in said)
    mmtune(
        "finetune",
        recipe,
        *common,
        *("--set", f"run_dir={four}", "--set", "finetune.batch_rows=1", "--cpu-processes", 4),
        check=0,
    )
    losses = [[row["loss"] for row in json_lines(f / "adapter" / "metrics.jsonl")] for f in (nodes, four)]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_several_nodes_need_a_place_to_meet(recipe):
    done = mmtune("finetune", recipe, "--nodes", 2, "--gpus", 1, "--json", check=2)
    assert json.loads(done.stdout)["error"]["code"] == "no_rendezvous"


def test_stopped_on_two_processes_it_goes_on_with_one(recipe):
    """The global batch stays, so the same rows come in the same steps; another global batch is refused."""
    unbroken, folder = fresh_run(recipe, "unbroken"), fresh_run(recipe, "changing")
    common = ["--set", "finetune.lora.dropout=0", "--set", "finetune.batch_rows=2", "--set", "finetune.max_steps=8"]
    mmtune("finetune", recipe, *common, "--set", f"run_dir={unbroken}", "--set", "finetune.accumulate=2", check=0)
    command = [sys.executable, "-m", "mmtune", "finetune", str(recipe), *common, "--set", f"run_dir={folder}"]
    for launch in range(2):
        child = subprocess.Popen(
            [*command, "--cpu-processes", "2", "--json"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        wanted = folder / "checkpoints" / "finetune" / f"step-{3 + 3 * launch:08d}" / "state.json"
        limit = time.monotonic() + 240
        while not wanted.exists() and child.poll() is None and time.monotonic() < limit:
            time.sleep(0.005)
        assert child.poll() is None, "it ended before it could be stopped"
        if launch == 0:
            child.send_signal(signal.SIGTERM)
            said, _ = child.communicate(timeout=120)
            assert child.returncode == json.loads(said)["error"]["exit_code"] == 75
        else:
            whole = psutil.Process(child.pid)
            for process in [whole, *whole.children(recursive=True)]:
                process.kill()
            child.wait()
    done = mmtune("finetune", recipe, *common, "--set", f"run_dir={folder}", check=7)
    assert "step_size.micro_batches" in done.stderr
    more = ["--set", f"run_dir={folder}", "--set", "finetune.accumulate=2"]
    done = mmtune("finetune", recipe, *common, *more, check=0)
    assert re.search(r"resuming after step [67]", done.stderr)
    losses = [[row["loss"] for row in json_lines(f / "adapter" / "metrics.jsonl")] for f in (unbroken, folder)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_report_names_both_models(recipe):
    metrics = json.loads((run_dir(recipe) / "report" / "metrics.json").read_text())
    assert {"base", "tuned"} <= set(json.dumps(metrics).replace('"', " ").split())
    rows = json_lines(run_dir(recipe) / "report" / "predictions.jsonl")
    assert len(rows) == 20 and {row["model"] for row in rows} == {"base", "tuned"}


def test_show_marks_the_loss(recipe):
    done = mmtune("show", run_dir(recipe) / "tokens", "--json", check=0)
    runs = json.loads(done.stdout)["row"]["runs"]
    taught = [run["text"] for run in runs if run["loss"]]
    assert taught and all(text in ("yes<|im_end|>", "no<|im_end|>") for text in taught)


def test_a_finished_run_is_found_again_without_torch(recipe):
    command = [sys.executable, "-X", "importtime", "-m", "mmtune", "run", str(recipe), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 0 and "mmtune.stages.evaluate" in imported
    assert not imported & {"torch", "transformers", "peft"}


def test_adapters_alone_are_stored(recipe):
    weights = load_file(run_dir(recipe) / "adapter" / "adapter_model.safetensors")
    assert weights and all("lora_" in name for name in weights)
    assert not any("vision" in name or "projector" in name for name in weights)


def test_the_readme_says_how_an_adapter_answers_and_merges_without_mmtune(
    recipe, tiny_vlm, repository, tmp_path, monkeypatch, capsys
):
    said = (repository / "README.md").read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", said, re.DOTALL).group(1)
    places = {"data/base": tiny_vlm, "runs/quickstart": run_dir(recipe), "data/scenes": repository / "data" / "scenes"}
    for place, here in places.items():
        assert place in code
        code = code.replace(place, str(here))
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(compile(code, "README.md", "exec"), found)
    assert capsys.readouterr().out
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    again = merged.generate(**found["inputs"], max_new_tokens=8)[0, found["inputs"]["input_ids"].shape[1] :]
    assert again.tolist() == found["answer"].tolist()
    assert AutoProcessor.from_pretrained(tmp_path / "merged").tokenizer.chat_template


def test_labels_in_tokens_are_answers(recipe):
    table = open_split(run_dir(recipe) / "tokens" / "train").to_pylist()
    for tree in table:
        assert len(tree["input_ids"]) == len(tree["labels"]) == len(tree["branch"]) == tree["length"]
        for branch in range(1, len(tree["example_ids"]) + 1):
            marks = [label for label, b in zip(tree["labels"], tree["branch"], strict=True) if b == branch]
            assert sum(label != -100 for label in marks) == 2


def test_trees_train_as_separate_rows_do(tmp_path, repository):
    """The stage's own losses, trees packed and rows apart: the same questions in the same step, the same numbers."""
    pictures = repository / "data" / "scenes" / "train"
    questions = ("How many digits are in the picture?", "What is the background color?", "Is there a 7?")
    rows = [
        {"image": picture.name, "question": question, "answer": answer}
        for picture in sorted(pictures.glob("*.png"))[:8]
        for question, answer in zip(questions, ("2", "black", "no"), strict=True)
    ]
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": {"path": str(repository / "data" / "base")},
        "sources": [
            {
                "id": "mine",
                "reader": "table",
                "split": "train",
                "path": str(table),
                "images": str(pictures),
                "columns": {"image": "image", "question": "question", "answer": "answer"},
            }
        ],
        "build": {"templates": "first"},
        # One batch holds the whole split, so that both layouts see the same rows in every step.
        "finetune": {"lora": {"r": 4}, "learning_rate": 1e-3, "batch_rows": 24, "max_steps": 3, "log_every": 1},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(settings))
    losses = {}
    for layout in ("tree", "rows"):
        overrides = ["--set", f"run_dir={tmp_path / layout}", "--set", f"tokenize.layout={layout}"]
        said = mmtune("run", recipe, *overrides, check=0).stderr
        assert ("train as one tree" in said) == (layout == "tree")
        losses[layout] = [row["loss"] for row in json_lines(tmp_path / layout / "adapter" / "metrics.jsonl")]
    assert len(losses["tree"]) == 3
    assert losses["tree"] == pytest.approx(losses["rows"], rel=1e-5)


def test_a_dry_run_says_what_each_stage_would_do(recipe):
    for stage in ("build-data", "tokenize", "finetune", "eval"):
        assert "is up to date" in mmtune(stage, recipe, "--dry-run", check=0).stderr
    said = mmtune("run", recipe, "--dry-run", check=0).stderr
    assert said.count("is up to date") == 4
    said = mmtune("tokenize", recipe, "--dry-run", "--set", "tokenize.max_length=150", check=0).stderr
    assert "max_length: 200 -> 150" in said
    said = mmtune("run", recipe, "--dry-run", "--set", f"run_dir={recipe.parent / 'elsewhere'}", check=0).stderr
    assert "finetune: would run once tokens is there" in said
    assert "eval: would run once instructions and adapter are there" in said
    assert not (recipe.parent / "elsewhere").exists()
