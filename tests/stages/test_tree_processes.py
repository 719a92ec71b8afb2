"""Packed trees, killed, spread over processes and cut smaller: the same examples in every step, the same numbers."""

import os
import shutil
import signal
import sys
import time

import psutil
import pytest
from accelerate.state import AcceleratorState

from mmtune.errors import Interrupted
from mmtune.stages.finetune import finetune
from mmtune.storage import read_manifest
from mmtune.talk import Talk
from mmtune.training import loop
from tests.stages.tree_runs import (
    AS_TREES,
    adapter_bytes,
    ended,
    ids_by_step,
    kill_all,
    lines_of,
    made_tokens,
    numbers_of,
    record,
    started,
    state_of,
    tree_recipe,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("own_precision")

# Two trees of three rows a step, with dropout where the bytes are compared.
STEPS = {"max_steps": 12, "batch_rows": 6}
# As many on two processes, or as two micro batches.
HALVES = {"max_steps": 12, "batch_rows": 3, "batch_tokens": 4096}
PLAIN = {"lora": {"r": 2}}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, repository, tiny_vlm):
    """tokens/ by layout."""
    layouts = ("tree", "rows")
    return {name: made_tokens(tmp_path_factory.mktemp(name), repository, tiny_vlm, name) for name in layouts}


@pytest.fixture
def fresh(tokens, tmp_path, repository, tiny_vlm):
    """A function from a name and settings to a recipe over the same tokens, in a run folder of its own."""

    def make(name, layout="tree", **settings):
        recipe = tree_recipe(tmp_path / name, repository, tiny_vlm, **settings)
        if not (recipe.run_dir / "tokens").exists():
            shutil.copytree(tokens[layout], recipe.run_dir / "tokens")
        return recipe

    return make


def here(recipe):
    """Trains in this process; returns what it says."""
    AcceleratorState._reset_state()
    console = Talk(quiet=True)
    finetune(recipe, console=console)
    return "\n".join(console.lines)


def as_laid_out(recipe, talk, layout="tree"):
    """Checks that a finished run trained trees, or rows where tokens/ has rows."""
    facts = read_manifest(recipe.run_dir / "adapter").facts
    assert (AS_TREES in talk) == (layout == "tree") and facts["batches"] == ("trees" if layout == "tree" else "rows")
    assert facts["steps"] == 12


def losses_of(recipe):
    return [line["loss"] for line in lines_of(recipe.run_dir)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        (STEPS, ()),
        (HALVES, ("--cpu-processes", "2")),
        ({**HALVES, "shard": "zero3"}, ("--cpu-processes", "2")),
    ],
    ids=["one process", "two", "two, zero3"],
)
def test_killed_twice_trees_end_with_the_same_bytes(fresh, settings, flags):
    unbroken, killed = fresh("unbroken", **settings), fresh("killed", **settings)
    as_laid_out(unbroken, ended(started(unbroken, *flags), 0))
    for step in (2, 6):
        child = started(killed, *flags)
        wait_for(state_of(killed, step), child)
        kill_all(child)
    talk = ended(started(killed, *flags), 0)
    assert "resuming after step" in talk
    as_laid_out(killed, talk)
    assert adapter_bytes(killed.run_dir) == adapter_bytes(unbroken.run_dir)
    assert numbers_of(killed.run_dir) == numbers_of(unbroken.run_dir)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "shard"), [("tree", "none"), ("tree", "zero3"), ("rows", "none")])
def test_stopped_on_two_processes_it_goes_on_with_one_and_the_same_examples(
    fresh, tmp_path, monkeypatch, layout, shard
):
    unbroken = fresh("unbroken", layout, **HALVES, **PLAIN, accumulate=2)
    changing = fresh("changing", layout, **HALVES, **PLAIN, shard=shard)
    both = tmp_path / "both"
    child = started(changing, "--cpu-processes", "2", recorded=both)
    wait_for(state_of(changing, 4), child)
    child.send_signal(signal.SIGTERM)
    ended(child, 75)
    begun = ids_by_step(both)
    record(both, monkeypatch.setattr)
    talk = here(fresh("changing", layout, **HALVES, **PLAIN, accumulate=2))
    as_laid_out(changing, talk, layout)
    assert "under other surroundings: processes: 2 -> 1" in talk and ("shard" in talk) == (shard == "zero3")
    monkeypatch.undo()
    record(tmp_path, monkeypatch.setattr)
    as_laid_out(unbroken, here(unbroken), layout)
    found, expected = ids_by_step(both), ids_by_step(tmp_path)
    assert 4 <= len(begun) < 12 and sorted(found) == list(range(12))
    assert layout == "rows" or all(len(ids) == 6 for ids in expected.values())
    assert found == expected
    assert losses_of(changing) == pytest.approx(losses_of(unbroken), rel=1e-4)


@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_it_goes_on_in_smaller_micro_batches_with_the_same_examples(fresh, tmp_path, monkeypatch, layout):
    runs = {name: tmp_path / f"ids of {name}" for name in ("whole", "cut")}
    for folder in runs.values():
        folder.mkdir()
    whole, large = fresh("whole", layout, **STEPS, **PLAIN), fresh("cut", layout, **STEPS, **PLAIN)
    record(runs["whole"], monkeypatch.setattr)
    as_laid_out(whole, here(whole), layout)
    monkeypatch.undo()
    record(runs["cut"], monkeypatch.setattr)
    polls = iter([False] * 4 + [True])
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "stop_wanted", lambda _: next(polls))
        with pytest.raises(Interrupted):
            here(large)
    small = fresh("cut", layout, **HALVES, **PLAIN, accumulate=2)
    talk = here(small)
    assert "resuming after step 5 of 12" in talk
    as_laid_out(small, talk, layout)
    found, expected = ids_by_step(runs["cut"]), ids_by_step(runs["whole"])
    assert found == expected and len(found) == 12
    assert losses_of(small) == pytest.approx(losses_of(whole), rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells a process of its parent's end on Linux only")
@pytest.mark.parametrize("killed", ["the command", "its launcher"])
def test_processes_of_a_killed_launcher_save_and_leave(fresh, tmp_path, monkeypatch, killed):
    long = {**HALVES, **PLAIN, "max_steps": 100_000, "save_every": 100_000}
    recipe, ids = fresh("run", **long), tmp_path / "ids"
    child = started(recipe, "--cpu-processes", "2", recorded=ids)
    limit = time.monotonic() + 240
    while len(ids_by_step(ids)) < 3 and child.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    folder = recipe.run_dir / "checkpoints" / "finetune"
    assert child.poll() is None and not folder.exists()
    below = psutil.Process(child.pid).children(recursive=True)
    (launcher,) = psutil.Process(child.pid).children()
    os.kill(child.pid if killed == "the command" else launcher.pid, signal.SIGKILL)
    child.communicate(timeout=60)
    gone, alive = psutil.wait_procs(below, timeout=60)
    for process in alive:
        process.kill()
    assert not alive and len(gone) >= 3
    # No save was due: this one is what the processes did when they were told.
    (saved,) = folder.iterdir()
    step = int(saved.name.removeprefix("step-"))
    assert step >= 3 and not (recipe.run_dir / "adapter").exists()
    monkeypatch.setattr(loop.Loop, "stop_wanted", lambda _: True)
    with pytest.raises(Interrupted, match=f"after step {step + 1} of"):
        here(fresh("run", **long, accumulate=2))
