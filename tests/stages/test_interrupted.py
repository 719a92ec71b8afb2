"""Runs that are stopped, killed or out of disk lose no saved step, leave nothing behind and end in the same bytes."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time

import pytest
import torch
from accelerate.state import AcceleratorState

from mmtune.__main__ import main
from mmtune.errors import IntegrityError, Interrupted, ResourceError
from mmtune.models import adapter
from mmtune.signals import STOPS
from mmtune.stages.finetune import finetune, preparation
from mmtune.talk import Talk
from mmtune.training import loop
from tests.stages.tree_runs import (
    AS_TREES,
    adapter_bytes,
    ended,
    kill_all,
    made_tokens,
    numbers_of,
    started,
    state_of,
    tree_recipe,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("own_precision")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, repository, tiny_vlm):
    return made_tokens(tmp_path_factory.mktemp("made"), repository, tiny_vlm)


@pytest.fixture
def fresh(tokens, tmp_path, repository, tiny_vlm):
    """A function from a name and settings to a recipe over the same tokens, in a run folder of its own."""

    def make(name="run", **settings):
        recipe = tree_recipe(tmp_path / name, repository, tiny_vlm, **settings)
        if not (recipe.run_dir / "tokens").exists():
            shutil.copytree(tokens, recipe.run_dir / "tokens")
        return recipe

    return make


@pytest.fixture(scope="module")
def unbroken(tokens, tmp_path_factory, repository, tiny_vlm):
    """The run folder of the usual settings, never stopped."""
    recipe = tree_recipe(tmp_path_factory.mktemp("unbroken"), repository, tiny_vlm)
    shutil.copytree(tokens, recipe.run_dir / "tokens")
    AcceleratorState._reset_state()
    console = Talk(quiet=True)
    finetune(recipe, console=console)
    assert any(AS_TREES in line for line in console.lines), console.lines
    return recipe.run_dir


def same(recipe, unbroken):
    assert adapter_bytes(recipe.run_dir) == adapter_bytes(unbroken)
    assert numbers_of(recipe.run_dir) == numbers_of(unbroken)
    assert not (recipe.run_dir / "checkpoints").exists()


def said(recipe):
    """What an undisturbed run says."""
    AcceleratorState._reset_state()
    console = Talk(quiet=True)
    finetune(recipe, console=console)
    return "\n".join(console.lines)


# The last step is saved, so that what comes after it costs none.


def test_a_run_that_failed_to_publish_only_publishes_again(fresh, unbroken, monkeypatch):
    recipe = fresh(save_every=100)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(adapter, "save_tuned", full)
        with pytest.raises(ResourceError, match=r"writing .*adapter: No space"):
            finetune(recipe, console=Talk(quiet=True))
    assert state_of(recipe, 6).is_file() and not (recipe.run_dir / "adapter").exists()
    steps = []
    monkeypatch.setattr(loop.Loop, "accumulate", lambda *_: steps.append(1))
    assert finetune(recipe, console=Talk(quiet=True))["steps"] == 6
    assert not steps
    same(recipe, unbroken)


# A file may not grow beyond a kilobyte once the adapter is written: a full disk, as the system tells of it.
FULL = """
import resource, signal
from mmtune.models import adapter
save = adapter.save_tuned
def on_a_full_disk(*given):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    save(*given)
adapter.save_tuned = on_a_full_disk
"""


@pytest.mark.slow
def test_a_full_disk_while_publishing_ends_with_5_and_the_next_run_has_the_bytes(fresh, unbroken):
    recipe = fresh()
    talk = ended(started(recipe, first=FULL), 5)
    assert "File too large" in talk and "run the same command again" in talk
    assert "resuming after step 6 of 6" in said(recipe)
    same(recipe, unbroken)


# A kill in the middle of a save.

SLOW = """
import pathlib, time
from mmtune.training import checkpoints
write = checkpoints.write_json
def slow(path, value):
    if value["step"] == 4:
        pathlib.Path({marker!r}).touch()
        time.sleep(600)
    write(path, value)
checkpoints.write_json = slow
"""


@pytest.mark.slow
def test_a_save_that_was_killed_is_swept_by_the_next_run(fresh, unbroken, tmp_path, monkeypatch):
    recipe, marker = fresh(), tmp_path / "saving"
    folder = recipe.run_dir / "checkpoints" / "finetune"
    child = started(recipe, first=SLOW.format(marker=str(marker)))
    wait_for(marker, child)
    kill_all(child)
    assert sorted(path.name.startswith(".tmp-") for path in folder.iterdir()) == [False, True]
    (folder / ".step-00000002.tmp-old-12345678").mkdir()
    monkeypatch.setattr(loop.Loop, "stop_wanted", lambda _: True)
    with pytest.raises(Interrupted):
        finetune(recipe, console=Talk(quiet=True))
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]
    monkeypatch.undo()
    said(recipe)
    same(recipe, unbroken)


# A signal in the middle of a validation.

LONG = """
import pathlib, time
from mmtune.training import validation
real = validation.validation_loss
def long(*given, stopping, **more):
    def asked():
        pathlib.Path({marker!r}).touch()
        time.sleep(0.5)
        return stopping()
    return real(*given, stopping=asked, **more)
validation.validation_loss = long
"""


@pytest.mark.slow
@pytest.mark.parametrize("eval_every", [3, None], ids=["within", "at the end"])
def test_a_stop_in_a_long_validation_ends_with_75_and_the_next_run_has_the_bytes(fresh, unbroken, tmp_path, eval_every):
    common = {"eval_every": eval_every, "save_every": 100}
    recipe, marker = fresh(**common), tmp_path / "validating"
    if eval_every:
        other = fresh("other", **common)
        finetune(other, console=Talk(quiet=True))
        unbroken = other.run_dir
    child = started(recipe, first=LONG.format(marker=str(marker)))
    wait_for(marker, child)
    os.kill(child.pid, signal.SIGTERM)
    step = eval_every or 6
    assert f"stopped by a signal after step {step} of 6; the state is saved" in ended(child, 75)
    assert [path.name for path in state_of(recipe, step).parent.parent.iterdir()] == [f"step-{step:08d}"]
    assert "val_loss" not in (state_of(recipe, step).parent / "metrics.jsonl").read_text()
    assert f"resuming after step {step} of 6" in said(recipe)
    same(recipe, unbroken)


# What a resumed run is known by, and what it says of its surroundings.


@pytest.mark.parametrize(
    ("changed", "said_of_it"),
    [
        ({"learning_rate": 0.5}, r"learning_rate: .+ -> 0\.5$"),
        ({"accumulate": 3}, r"step_size\.micro_batches: 1 -> 3$"),
    ],
)
def test_another_run_is_refused_before_a_model_is_loaded(fresh, monkeypatch, changed, said_of_it):
    recipe = fresh()
    other = recipe.model_copy(update={"finetune": recipe.finetune.model_copy(update=changed)})
    monkeypatch.setattr(loop.Loop, "stop_wanted", lambda _: True)
    with pytest.raises(Interrupted):
        finetune(recipe, console=Talk(quiet=True))
    monkeypatch.setattr(preparation, "model_to_train", None)
    with pytest.raises(IntegrityError, match=said_of_it) as error:
        finetune(other, console=Talk(quiet=True))
    assert error.value.code == "other_run" and "--resume never" in error.value.hint


def test_a_stopped_redo_of_a_finished_run_is_told(fresh, unbroken, monkeypatch):
    recipe = fresh()
    shutil.copytree(unbroken / "adapter", recipe.run_dir / "adapter")
    polls = iter([False, False, True])
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop.Loop, "stop_wanted", lambda _: next(polls))
        AcceleratorState._reset_state()
        finetune(recipe, force=True, console=Talk(quiet=True))
    found = said(recipe)
    assert "is up to date" in found
    assert "finetune: a run with --force was stopped after step 3; it goes on by: mmtune finetune --force" in found
    AcceleratorState._reset_state()
    finetune(recipe, force=True, console=Talk(quiet=True))
    same(recipe, unbroken)
    assert "--force" not in said(recipe)


def test_another_attention_kernel_is_another_run(fresh, unbroken, monkeypatch):
    recipe = fresh()
    asked = recipe.model_copy(update={"model": recipe.model.model_copy(update={"attn": "eager"})})
    monkeypatch.setattr(loop.Loop, "stop_wanted", lambda _: True)
    with pytest.raises(Interrupted):
        finetune(recipe, console=Talk(quiet=True))
    with pytest.raises(IntegrityError, match=r'belongs to another run: config.attn: "auto" -> "eager"'):
        finetune(asked, console=Talk(quiet=True))
    monkeypatch.undo()
    said(recipe)
    with pytest.raises(IntegrityError, match=r'made with other settings or data: config.attn: "auto" -> "eager"'):
        finetune(asked, console=Talk(quiet=True))
    same(recipe, unbroken)


def test_a_checkpoint_names_its_surroundings_and_a_run_under_others_says_so(fresh, unbroken, monkeypatch):
    recipe = fresh()
    polls = iter([False, False, True])
    monkeypatch.setattr(loop.Loop, "stop_wanted", lambda _: next(polls))
    with pytest.raises(Interrupted):
        finetune(recipe, console=Talk(quiet=True))
    monkeypatch.undo()
    file = state_of(recipe, 3)
    state = json.loads(file.read_text())
    under = state["surroundings"]
    assert under["versions"]["torch"] == torch.__version__ and under["versions"]["mmtune"]
    assert {name: under[name] for name in ("processes", "threads", "device", "shard")} == {
        "processes": 1,
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "shard": "none",
    }
    assert under["attention"] == "sdpa"
    under["threads"], under["versions"]["torch"] = 64, "1.0"
    file.write_text(json.dumps(state))
    talk = said(recipe)
    assert f"under other surroundings: threads: 64 -> {torch.get_num_threads()}; versions.torch: " in talk
    same(recipe, unbroken)


def test_under_the_same_surroundings_nothing_is_said(fresh, monkeypatch):
    recipe = fresh()
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "stop_wanted", lambda _: True)
        with pytest.raises(Interrupted):
            finetune(recipe, console=Talk(quiet=True))
    talk = said(recipe)
    assert "resuming after step 1" in talk and "surroundings" not in talk


# Bad input and bad luck, by the exit code of the command line.


@pytest.fixture
def cli(monkeypatch, capsys):
    """A function from a recipe to the exit code of ``mmtune finetune`` and the error in its document."""
    handlers = {number: signal.getsignal(number) for number in STOPS}

    def call(recipe):
        AcceleratorState._reset_state()
        path = recipe.run_dir / "recipe.json"
        path.write_text(recipe.model_dump_json())
        monkeypatch.setattr("sys.argv", ["mmtune", "finetune", str(path), "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        out = capsys.readouterr()
        assert "Traceback" not in out.err
        return ended.value.code, json.loads(out.out).get("error")

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_flipped_byte_in_a_checkpoint_ends_with_7_and_its_hint_leads_to_the_bytes(fresh, unbroken, cli, monkeypatch):
    recipe = fresh()
    polls = iter([False] * 4 + [True])
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "stop_wanted", lambda _: next(polls))
        code, error = cli(recipe)
        assert (code, error["code"]) == (75, "interrupted")
    newest = state_of(recipe, 5).parent
    file = newest / "optimizer.safetensors"
    flipped = bytearray(file.read_bytes())
    flipped[-3] ^= 4
    file.write_bytes(flipped)
    code, error = cli(recipe)
    assert (code, error["code"]) == (7, "damaged_checkpoint") and str(file) in error["message"]
    assert f"delete {newest} and run the same command again to go on from step-00000004" in error["hint"]
    assert not (recipe.run_dir / "adapter").exists()
    shutil.rmtree(newest)
    assert cli(recipe) == (0, None)
    same(recipe, unbroken)


@pytest.mark.parametrize("where", ["between steps", "in a step"])
def test_a_killed_loader_ends_with_5_and_the_next_run_has_the_bytes(fresh, unbroken, cli, monkeypatch, where):
    recipe = fresh(workers=1)
    warn, accumulate, steps = loop.Loop.warn_of_spike, loop.Loop.accumulate, []

    def kill(*_):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
            # The loader hears of it by a signal, wherever the loop then is.
            worker.join(10)
            time.sleep(0.1)

    def between(own, *given):
        if own.outcome.step == 3:
            kill()
        warn(own, *given)

    def within(*given):
        steps.append(1)
        if len(steps) == 3:
            kill()
        return accumulate(*given)

    with monkeypatch.context() as patch:
        if where == "between steps":
            patch.setattr(loop.Loop, "warn_of_spike", between)
        else:
            patch.setattr(loop.Loop, "accumulate", within)
        code, error = cli(recipe)
    assert (code, error["code"]) == (5, "worker_died") and "finetune.workers" in error["hint"]
    assert state_of(recipe, 2).is_file() and not (recipe.run_dir / "adapter").exists()
    assert cli(recipe) == (0, None)
    same(recipe, unbroken)


def test_lora_targets_that_match_nothing_end_with_2(fresh, cli):
    recipe = fresh(lora={"r": 2, "targets": ["q_prj"]})
    code, error = cli(recipe)
    assert (code, error["exit_code"]) == (2, 2) and "q_prj" in error["message"] and "q_proj" in error["hint"]
    assert not (recipe.run_dir / "adapter").exists() and not (recipe.run_dir / "checkpoints").exists()
