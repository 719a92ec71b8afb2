"""Which processors a command line gets: as many as it asks for, or an error that says what there is."""

import json
import os
import signal
import sys

import pytest
import torch

from mmtune.__main__ import main
from mmtune.errors import EXIT_FOLDER, MmtuneError
from mmtune.order import run_stages
from mmtune.recipe import Recipe
from mmtune.signals import STOPS
from mmtune.stages import finetune as stage
from mmtune.storage.manifest import Manifest, write_manifest
from mmtune.talk import Talk
from mmtune.training import launch


@pytest.fixture
def called(tmp_path, monkeypatch, capsys):
    """A function from flags to the exit code, the JSON document and what the stage saw; no stage runs."""
    for name in launch.CPU_ONLY:
        # Put back when the test is over, whatever the command sets.
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"run_dir": "run", "model": {"path": "m"}, "finetune": {}}))
    seen = []

    def trained(recipe, **given):
        seen.append({name: os.environ.get(name) for name in launch.CPU_ONLY})
        return {"stage": "finetune"}

    monkeypatch.setattr(stage, "finetune", trained)

    def call(*flags, gpus=0):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr("sys.argv", ["mmtune", "finetune", str(path), "--json", *map(str, flags)])
        with pytest.raises(SystemExit) as ended:
            main()
        out = capsys.readouterr()
        return ended.value.code, json.loads(out.out), seen

    return call


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_gpus_that_are_not_there_are_missed(called, count, more):
    code, said, seen = called("--gpus", count, *more)
    assert code == 4 and said["error"]["code"] == "gpus_missing" and "this machine has none" in said["error"]["message"]
    assert f"--cpu-processes {count}" in said["error"]["hint"] and not seen


def test_fewer_gpus_than_asked_for_are_counted(called):
    code, said, seen = called("--gpus", 4, gpus=2)
    assert code == 4 and "--gpus 4: this machine has 2" in said["error"]["message"] and not seen
    assert "use fewer" in said["error"]["hint"]


def test_one_gpu_that_is_there_is_taken(called):
    code, _, seen = called("--gpus", 1, gpus=1)
    assert code == 0 and seen == [dict.fromkeys(launch.CPU_ONLY)]


@pytest.mark.parametrize("count", [1, 2])
def test_gpus_and_cpu_processes_exclude_each_other(called, count):
    code, said, seen = called("--gpus", 1, "--cpu-processes", count, gpus=8)
    assert code == 2 and said["error"]["code"] == "usage" and not seen


def test_one_cpu_process_takes_no_gpu(called):
    code, _, seen = called("--cpu-processes", 1, gpus=1)
    assert code == 0 and seen == [launch.CPU_ONLY]
    assert seen[0]["CUDA_VISIBLE_DEVICES"] == "" and seen[0]["ACCELERATE_USE_CPU"] == "true"


@pytest.mark.parametrize("command", ["run", "pretrain"])
def test_every_command_that_trains_refuses_what_is_not_there(called, monkeypatch, tmp_path, capsys, command):
    for flags, code in ((("--gpus", "2"), 4), (("--gpus", "1", "--cpu-processes", "1"), 2)):
        monkeypatch.setattr("sys.argv", ["mmtune", command, str(tmp_path / "recipe.yaml"), *flags])
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code and not (tmp_path / "run").exists()


def test_a_run_trains_on_processes_what_is_not_finished(tmp_path, monkeypatch):
    from mmtune.cli.training import on_processes

    started, alone = [], []

    def launched(what, arguments, processes, **given):
        started.append((what, arguments, processes, given["cpu"]))
        (tmp_path / "adapter").mkdir(exist_ok=True)
        write_manifest(tmp_path / "adapter", Manifest("finetune", "h", facts={"steps": 7}))

    def one(name):
        return lambda recipe, **given: alone.append(name) or {"cached": True}

    monkeypatch.setattr(launch, "launch", launched)
    recipe, console = Recipe(run_dir=tmp_path), Talk(quiet=True)

    def stages(force):
        plain = ((name, one(name), {"offline": True}) for name in ("tokenize", "finetune", "eval"))
        return on_processes(plain, 2, ["r.yaml", "--set", "a=1"], cpu=True, force=force)

    found = run_stages(recipe, stages(False), force=False, dry_run=False, console=console)
    asked = ("finetune", ["finetune", "r.yaml", "--set", "a=1", "--cpu-processes", "2"], 2, True)
    assert started == [asked] and alone == ["tokenize", "eval"] and found["finetune"]["steps"] == 7
    run_stages(recipe, stages(False), force=False, dry_run=False, console=console)
    assert started == [asked] and alone[2:] == ["tokenize", "finetune", "eval"], "nothing starts for what is finished"
    run_stages(recipe, stages(True), force=True, dry_run=False, console=console)
    assert started == [asked, asked]


def test_several_cpu_processes_take_none_either():
    environment = launch.launch_environment(2, cpu=True)
    assert {name: environment[name] for name in launch.CPU_ONLY} == launch.CPU_ONLY
    assert "ACCELERATE_USE_CPU" not in launch.launch_environment(2)


@pytest.fixture
def ended(monkeypatch):
    """A function from what the processes leave, in that order, to what the launch of two says."""
    kept = {number: signal.getsignal(number) for number in STOPS}

    def launched(*said):
        words = [(str(rank), {"message": "", "hint": "", "code": "", "exit_code": code}) for rank, code in said]
        script = (
            "import json, os, sys, time\n"
            f"for rank, word in {words!r}:\n"
            f"    open(os.path.join(os.environ[{EXIT_FOLDER!r}], rank), 'w').write(json.dumps(word))\n"
            "    time.sleep(0.05)\n"
            "sys.exit(1)"
        )
        monkeypatch.setattr(launch, "launch_command", lambda *_, **__: [sys.executable, "-c", script])
        with pytest.raises(MmtuneError) as caught:
            launch.launch("finetune", [], 2, cpu=True, say=lambda _: None)
        return caught.value.exit_code

    yield launched
    for number, before in kept.items():
        signal.signal(number, before)


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ([], 5),  # both were killed
        ([(0, 75)], 5),  # one was killed, and the launcher stopped the other
        ([(0, 75), (1, 75)], 75),  # somebody stopped both
        ([(1, 6), (0, 75)], 6),  # the first to fail is the cause
    ],
)
def test_the_cause_of_an_end_is_told_from_what_followed(ended, said, code):
    assert ended(*said) == code


def test_a_launcher_that_was_stopped_before_it_started_any_lost_none(ended, monkeypatch):
    """It has no answer to a signal yet, and dies of it."""
    monkeypatch.setattr(launch, "hear", lambda hand_on: hand_on(signal.SIGTERM, None))
    assert ended() == 75
