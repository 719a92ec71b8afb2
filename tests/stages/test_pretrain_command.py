"""mmtune pretrain as a command: killed, stopped, on two processes, dry, forced, refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

CODED = "{caption: 1, reconstruction: 0.1, adversarial: 0.05, contrastive: 0.1, masked: 0.2, match: 0.2}"
PLAIN = "{caption: 1, contrastive: 0.1}"


def mmtune(*arguments, check=None):
    done = subprocess.run(
        [sys.executable, "-m", "mmtune", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    if check is not None:
        assert done.returncode == check, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, repository) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    data = repository / "data"
    notes = data / "scenes" / "annotations"
    sources = [
        {
            "id": "compare",
            "reader": "vqa_v2",
            "split": split,
            "questions": str(notes / f"compare_{split}_questions.json"),
            "annotations": str(notes / f"compare_{split}_annotations.json"),
            "images": str(data / "scenes" / split),
            "limit": 24,
        }
        for split in ("train", "val")
    ]
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    build = {"text": small, "tokenizer": str(data / "base")}
    build["encoders"] = {"image": {**small, "image_size": 24, "patch_size": 12}}
    settings = {"build": build, "max_steps": 10, "batch_rows": 4, "save_every": 2, "log_every": 3}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"run_dir": str(folder / "run"), "seed": 3, "sources": sources, "pretrain": settings}))
    mmtune("build-data", path, "--quiet", check=0)
    return path


def command(recipe, name, objectives, *more):
    """The command in a run folder of its own, over the same instructions."""
    folder = recipe.parent / name
    folder.mkdir(exist_ok=True)
    if not (folder / "instructions").exists():
        (folder / "instructions").symlink_to(recipe.parent / "run" / "instructions")
    own = ["--set", f"run_dir={folder}", "--set", f"pretrain.objectives={objectives}"]
    return ["pretrain", str(recipe), *own, *map(str, more)], folder


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "base" / "metrics.jsonl").read_text().splitlines()]
    timed = ("rows_per_second", "tokens_per_second", "wait_share", "grad_norm")
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


def weights(folder):
    return (folder / "base" / "model.safetensors").read_bytes()


def started(arguments, folder, step):
    """A run that has written the checkpoint of a step."""
    child = subprocess.Popen(
        [sys.executable, "-m", "mmtune", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wanted = folder / "checkpoints" / "pretrain" / f"step-{step:08d}" / "state.json"
    limit = time.monotonic() + 200
    while not wanted.exists() and child.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)
    assert child.poll() is None, child.stderr.read()[-2000:]
    return child


def kill(child):
    for process in [*psutil.Process(child.pid).children(recursive=True), psutil.Process(child.pid)]:
        process.kill()
    child.wait()


@pytest.fixture(scope="module")
def unbroken(recipe):
    arguments, folder = command(recipe, "unbroken", CODED)
    done = mmtune(*arguments, "--json", check=0)
    found = json.loads(done.stdout)
    assert found["ok"] and found["schema"] == "mmtune.pretrain/1" and found["steps"] == 10
    assert "Writing model shards" not in done.stderr
    return folder, done


def test_killed_twice_it_ends_with_the_same_bytes(recipe, unbroken):
    arguments, folder = command(recipe, "killed", CODED)
    for step in (2, 6):
        kill(started(arguments, folder, step))
        assert not (folder / "base").exists()
    shown = json.loads(mmtune("show", folder, "--json", check=0).stdout)
    assert shown["pretrain_stopped_after_step"] >= 6
    done = mmtune(*arguments, check=0)
    assert "resuming after step" in done.stderr
    assert weights(folder) == weights(unbroken[0])
    assert metrics(folder) == metrics(unbroken[0])
    assert not (folder / "checkpoints").exists()


def test_a_polite_stop_exits_75_and_other_settings_are_refused(recipe, unbroken):
    arguments, folder = command(recipe, "stopped", CODED)
    child = started(arguments, folder, 2)
    child.send_signal(signal.SIGTERM)
    _, talk = child.communicate(timeout=120)
    assert child.returncode == 75, talk[-2000:]
    assert "state is saved" in talk and "Traceback" not in talk
    done = mmtune(*arguments, "--set", "pretrain.learning_rate=0.5", "--json", check=7)
    error = json.loads(done.stdout)["error"]
    assert "learning_rate: 0.001 -> 0.5" in error["message"] and "--resume never" in error["hint"]
    mmtune(*arguments, check=0)
    assert weights(folder) == weights(unbroken[0])


def test_a_finished_base_is_kept_refused_or_made_again(recipe, unbroken):
    arguments, folder = command(recipe, "unbroken", CODED)
    before = weights(folder)
    assert json.loads(mmtune(*arguments, "--json", check=0).stdout)["cached"]
    changed = mmtune(*arguments, "--set", "pretrain.codes.width=8", "--json", check=7)
    assert "codes.width: 32 -> 8" in json.loads(changed.stdout)["error"]["message"]
    dry = mmtune(*arguments, "--dry-run", "--json", check=0)
    assert json.loads(dry.stdout)["dry_run"] and weights(folder) == before
    again = mmtune(*arguments, "--force", "--limit", 8, "--seed", 4, "--json", check=0)
    assert not json.loads(again.stdout)["cached"] and weights(folder) != before
    mmtune(*arguments, "--force", "--quiet", check=0)
    assert weights(folder) == before


def test_a_dry_run_writes_nothing(recipe):
    arguments, folder = command(recipe, "dry", CODED)
    done = mmtune(*arguments, "--dry-run", "--json", check=0)
    assert json.loads(done.stdout)["dry_run"] and [path.name for path in folder.iterdir()] == ["instructions"]


def test_two_processes_take_the_same_steps_and_survive_a_kill(recipe):
    """Two processes of one micro batch are one of two: same losses, by name too, and nearly the same weights."""
    one, alone = command(recipe, "one", PLAIN, "--set", "pretrain.accumulate=2")
    two, pair = command(recipe, "two", PLAIN, "--cpu-processes", 2)
    mmtune(*one, check=0)
    done = mmtune(*two, "--json", check=0)
    assert json.loads(done.stdout)["ok"] and "pretrain: starting" in done.stderr and "nproc_per_node 2" in done.stderr
    for mine, theirs in zip(metrics(alone), metrics(pair), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    first, second = (load_file(folder / "base" / "model.safetensors") for folder in (alone, pair))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-3, atol=1e-4)
    killed, folder = command(recipe, "two-killed", PLAIN, "--cpu-processes", 2)
    kill(started(killed, folder, 4))
    mmtune(*killed, check=0)
    assert weights(folder) == weights(pair)
    for mine, theirs in zip(metrics(folder), metrics(pair), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)


def test_a_failure_names_the_sections_own_key(recipe):
    arguments, _ = command(recipe, "diverging", PLAIN)
    done = mmtune(*arguments, "--set", "pretrain.learning_rate=10", "--set", "pretrain.clip=null", "--json")
    said = json.loads(done.stdout)
    if done.returncode:
        assert done.returncode == 6 and "lower pretrain.learning_rate" in said["error"]["hint"]
