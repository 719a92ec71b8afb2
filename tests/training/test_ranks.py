"""Two gloo processes take the steps of one, also where only one of them sees a picture."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

sys.path.insert(0, str(Path(__file__).parent))
from course import Rows, run, tiny_model

from mmtune.errors import ResourceError
from mmtune.models.adapter import train_fully
from mmtune.training.ranks import meeting, share_weights, sum_tensor

# Pictures in some rows only: at times on both ranks, on one, on none.
MIXED = frozenset({0, 3, 4})
TOWERS = {"llm and vision": ["llm", "vision"], "vision alone": ["vision"]}


def train_all(split):
    found = {}
    for name, towers in TOWERS.items():
        model = train_fully(tiny_model(), towers)
        share_weights(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        plain = torch.optim.SGD(trained, lr=0.1, weight_decay=0.01)
        result = run(model, Rows(count=8, pictures=MIXED), optimizer=plain, rate=0.1, steps=4, **split)
        found[name] = (result.losses, {key: value.clone() for key, value in model.state_dict().items()})
    return found


def init(rank, folder, seconds=60):
    import datetime
    import os

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=seconds),
    )


def one_rank(rank, folder):
    init(rank, folder)
    found = train_all({"batch_rows": 1})
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one_with_twice_the_rows(tmp_path):
    multiprocessing.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / "found.pt")
    for name, (losses, weights) in train_all({"batch_rows": 1, "accumulate": 2}).items():
        assert found[name][0] == pytest.approx(losses, rel=1e-6)
        for key, value in weights.items():
            assert torch.allclose(found[name][1][key], value, rtol=1e-5, atol=1e-6), (name, key)


class SlowRows(Rows):
    def batch(self, rows, step=None):
        time.sleep(0.3)
        return super().batch(rows, step)


def slow_rank(rank, folder):
    init(rank, folder)
    kind = SlowRows if rank else Rows
    result = run(tiny_model(), kind(count=8), batch_rows=1, steps=4)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result.outcome.teamwork))
    torch.distributed.destroy_process_group()


def test_a_process_that_waits_for_a_slow_one_shows(tmp_path):
    multiprocessing.spawn(slow_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["rank_balance"] == second["rank_balance"]
    # One works 0.3 s and a little, the other a little.
    assert 0.5 < first["rank_balance"] < 0.8 and 0.4 < first["scaling_efficiency"] < 0.8


def stuck_rank(rank, folder):
    init(rank, folder, seconds=2)
    if rank == 1:
        time.sleep(20)
        return
    began = time.monotonic()
    try:
        sum_tensor(torch.ones(3), "summing gradients")
    except ResourceError as error:
        (Path(folder) / "said").write_text(f"{error.exit_code} {time.monotonic() - began:.0f} {error.message}")


@pytest.mark.parametrize("said", ["[gloo/transport/tcp/pair.cc:553] Connection closed by peer", "NCCL error: timeout"])
def test_an_exchange_that_failed_is_known_among_other_errors(said):
    with pytest.raises(ResourceError, match="while training"), meeting("training"):
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="shapes"), meeting("training"):
        raise RuntimeError("shapes do not fit")


def test_a_stuck_process_ends_the_others_within_the_limit(tmp_path):
    processes = multiprocessing.spawn(stuck_rank, args=(str(tmp_path),), nprocs=2, join=False)
    processes.processes[0].join(60)
    processes.processes[1].kill()
    code, seconds, message = (tmp_path / "said").read_text().split(" ", 2)
    assert code == "5" and int(seconds) <= 10
    assert "died or is stuck while summing gradients" in message
