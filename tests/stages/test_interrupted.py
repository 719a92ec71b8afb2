"""Runs that are stopped, killed or out of disk lose no saved step, leave nothing behind and end in the same bytes."""

import errno
import os
import shutil
import signal

import pytest
from accelerate.state import AcceleratorState

from mmtune.errors import Interrupted
from mmtune.models import adapter
from mmtune.stages.finetune import finetune
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


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, repository, tiny_vlm):
    return made_tokens(tmp_path_factory.mktemp("made"), repository, tiny_vlm)


@pytest.fixture(autouse=True)
def own_precision():
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


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
        with pytest.raises(OSError, match="No space"):
            finetune(recipe, console=Talk(quiet=True))
    assert state_of(recipe, 6).is_file() and not (recipe.run_dir / "adapter").exists()
    steps = []
    monkeypatch.setattr(loop, "_accumulate", lambda *_: steps.append(1))
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
    monkeypatch.setattr(loop, "_stop_wanted", lambda stop, accelerator: True)
    with pytest.raises(Interrupted):
        finetune(recipe, console=Talk(quiet=True))
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]
    monkeypatch.undo()
    said(recipe)
    same(recipe, unbroken)


# A signal in the middle of a validation.

LONG = """
import pathlib, time
from mmtune.stages.finetune import course
real = course._validation_loss
def long(run, stopping):
    def asked():
        pathlib.Path({marker!r}).touch()
        time.sleep(0.5)
        return stopping()
    return real(run, asked)
course._validation_loss = long
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
