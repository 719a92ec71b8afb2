"""finetune on several processes: they end with the code of the contract, and what they leave goes on."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from mmtune.errors import CapabilityError
from mmtune.models.load import load_tuned
from mmtune.stages.finetune import finetune
from mmtune.storage import read_manifest
from mmtune.talk import Talk

pytestmark = pytest.mark.usefixtures("own_precision")


def wait_for(path, child):
    limit = time.monotonic() + 200
    while not path.exists() and child.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    assert path.exists(), child.communicate()[1][-3000:]


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def listens(child, port):
    return any(one.laddr.port == port for one in psutil.Process(child.pid).net_connections() if one.status == "LISTEN")


def rank_process(child, rank):
    """The process of a rank below a launcher."""
    for process in psutil.Process(child.pid).children(recursive=True):
        if process.environ().get("RANK") == str(rank):
            return process.pid
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.slow
def test_a_diverged_run_ends_with_6_and_a_finished_one_is_not_redone(two):
    bad = two(method="full", learning_rate=10, max_steps=60, warmup=0, clip=None, beta2=0.01)
    _, talk = bad.communicate(timeout=300)
    assert bad.returncode == 6, talk[-3000:]
    assert "is not finite" in talk
    done = two(max_steps=2)
    _, talk = done.communicate(timeout=300)
    assert done.returncode == 0, talk[-3000:]
    again = two(max_steps=2)
    _, talk = again.communicate(timeout=300)
    assert again.returncode == 0 and "up to date" in talk


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["zero2", "zero3"])
def test_deepspeed_goes_from_recipe_to_adapter_and_its_checkpoint_goes_on_without(two, fresh, shard):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (pip install 'mmtune[deepspeed]')")
    spread = {"shard": shard, "engine": "deepspeed"}
    bad = two(**spread, method="full", learning_rate=10, max_steps=60, warmup=0, clip=None, beta2=0.01)
    _, talk = bad.communicate(timeout=300)
    assert bad.returncode == 6, talk[-3000:]
    shutil.rmtree(fresh().run_dir / "checkpoints", ignore_errors=True)
    child = two(**spread, max_steps=200, save_every=2, batch_rows=2)
    wait_for(fresh().run_dir / "checkpoints" / "finetune" / "step-00000002" / "state.json", child)
    child.send_signal(signal.SIGTERM)
    _, talk = child.communicate(timeout=300)
    assert child.returncode == 75, talk[-3000:]
    done = two(max_steps=200, batch_rows=2)
    _, talk = done.communicate(timeout=300)
    assert done.returncode == 0 and "resuming after step" in talk, talk[-3000:]
    assert "scaling efficiency" in talk
    recipe = fresh()
    assert 0 < read_manifest(recipe.run_dir / "adapter").facts["scaling_efficiency"] <= 1
    load_tuned(recipe.model.path, recipe.run_dir / "adapter")


def test_deepspeed_that_is_missing_is_named(fresh, monkeypatch):
    from mmtune.training import zero

    monkeypatch.setattr(zero.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CapabilityError, match="DeepSpeed") as said:
        finetune(fresh(engine="deepspeed", shard="zero2"), console=Talk(quiet=True))
    assert "mmtune[deepspeed]" in said.value.hint


@pytest.mark.slow
def test_a_process_that_waits_for_another_one_can_be_stopped(fresh, tmp_path):
    """It waits in C++, where Python answers no signal; the other one may have been stopped and gone."""
    path, port = tmp_path / "recipe.json", free_port()
    path.write_text(fresh().model_dump_json())
    place = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    child = subprocess.Popen(
        [sys.executable, "-m", "mmtune", "finetune", str(path)],
        env={**os.environ, **place, "ACCELERATE_USE_CPU": "true"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while child.poll() is None and not listens(child, port):
            time.sleep(0.1)
        time.sleep(1)
        child.send_signal(signal.SIGTERM)
        _, talk = child.communicate(timeout=25)
    finally:
        child.kill()
    assert child.returncode == 75 and "error: stopped" in talk, talk[-3000:]
    assert not (fresh().run_dir / "adapter").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shard", "sent"), [("none", signal.SIGKILL), ("zero3", signal.SIGKILL), ("zero3", signal.SIGSTOP)]
)
def test_a_lost_process_ends_the_run_and_the_checkpoint_stays(two, fresh, shard, sent):
    child = two(max_steps=100_000, save_every=2, rank_timeout_seconds=5, shard=shard)
    folder = fresh().run_dir / "checkpoints" / "finetune"
    wait_for(folder / "step-00000002" / "state.json", child)
    os.kill(rank_process(child, 1), sent)
    began = time.monotonic()
    _, talk = child.communicate(timeout=120)
    assert time.monotonic() - began < 60
    assert child.returncode == 5, talk[-3000:]
    assert "died" in talk and not (fresh().run_dir / "adapter").exists()
    assert any((step / "state.json").is_file() for step in folder.glob("step-*"))
