"""Two gloo processes whose language model DeepSpeed's ZeRO spreads train as one process that holds it all."""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (pip install 'mmtune[deepspeed]')")

sys.path.insert(0, str(Path(__file__).parent))
from course import Rows, run
from test_ranks import init
from test_sharding import course, model_of, numbers, rows_of

from mmtune.errors import DivergedError
from mmtune.models.adapter import load_trainable_state, save_tuned, trainable_state, whole_state
from mmtune.models.lora_linear import fuse_lora
from mmtune.models.spread import own_part
from mmtune.training.loss import answer_loss
from mmtune.training.optimizer import load_optimizer_state, make_optimizer, optimizer_state
from mmtune.training.zero import Zero, language_parts

pytestmark = pytest.mark.slow

# What trains; pictures come on both processes, on one, on none.
CASES = ("full", "full, pictures on one process alone", "lora", "lora, computed again", "lora in bf16", "ia3")
STAGES = (2, 3)
# With gradients and optimizer state in the CPU's memory.
RESTING = {("full", 2), ("ia3", 3)}


def make(model):
    return make_optimizer(model, rate=0.01, weight_decay=0.0, beta2=0.99)


def start_of(case, stage):
    """As the stage does: ZeRO-3 would keep the adapters in the precision of the frozen weights."""
    return model_of(case).float() if stage == 3 else model_of(case)


def spread(case, stage, offload=False):
    model = start_of(case, stage)
    if case == "lora":
        fuse_lora(model)
    return model, Zero(model, make, stage=stage, device=torch.device("cpu"), offload=offload)


def rehearsed(model, optimizer):
    """Runs a batch and forgets it, as the stage does before step 1."""
    model.train()
    loss, _ = optimizer.run(lambda: answer_loss(model, Rows().batch([0, 1, 2])))
    optimizer.backward(loss, last=True)
    optimizer.forget()


def two_ranks(rank, folder):
    os.environ["DS_ACCELERATOR"] = "cpu"
    init(rank, folder)
    found = {}
    for case in CASES:
        for stage in STAGES:
            model, optimizer = spread(case, stage, offload=(case, stage) in RESTING)
            rehearsed(model, optimizer)
            result = run(model, rows_of(case), **course(case, batch_rows=1, optimizer=optimizer))
            found[case, stage] = numbers(result), trainable_state(model)
            if stage == 3:
                inside = [p for part in language_parts(model) for p in part.parameters()]
                assert sum(own_part(p).numel() for p in inside) < 0.7 * sum(p.ds_numel for p in inside)
    # Stopped after two steps and resumed, by the same stage, by the other, and, by the test, in one process.
    for stage in STAGES:
        model, optimizer = spread("lora", stage)
        run(model, rows_of("lora"), **course("lora", batch_rows=1, steps=2, optimizer=optimizer))
        saved = trainable_state(model), optimizer_state(optimizer, model)
        for again in STAGES:
            model, optimizer = spread("lora", again)
            load_trainable_state(model, saved[0])
            load_optimizer_state(optimizer, model, saved[1])
            rest = run(model, rows_of("lora"), **course("lora", batch_rows=1, optimizer=optimizer), start=2)
            found["resumed", stage, again] = numbers(rest), trainable_state(model)
        found["saved", stage] = saved
        # A gradient that is not finite is met before the step.
        model, optimizer = spread("full", stage)
        before = trainable_state(model)
        spoilt = Rows(count=8, spoilt=frozenset(range(8)))
        with pytest.raises(DivergedError):
            run(model, spoilt, **course("full", batch_rows=1, optimizer=optimizer))
        assert all(torch.equal(value, before[name]) for name, value in trainable_state(model).items())
        # What is saved is whole.
        model, _ = spread("lora", stage)
        state = whole_state(model)
        if rank == 0:
            save_tuned(model, Path(folder) / f"lora{stage}", state)
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(two_ranks, args=(str(folder),), nprocs=2)
    return folder, torch.load(folder / "found.pt")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", CASES)
def test_as_one_process_with_twice_the_rows(ranks, case, stage):
    model = start_of(case, stage)
    alone = run(model, rows_of(case), **course(case, batch_rows=1, accumulate=2))
    expected = trainable_state(model)
    rough = case == "lora in bf16"
    numbers_found, weights = ranks[1][case, stage]
    assert numbers_found == pytest.approx(numbers(alone), rel=5e-2 if rough else 1e-4)
    assert weights.keys() == expected.keys()
    tight = {"rtol": 2e-2, "atol": 4e-3} if rough else {"rtol": 1e-4, "atol": 2e-4}
    for name, value in expected.items():
        assert torch.allclose(weights[name], value, **tight), name


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_by_the_same_stage_it_is_the_unbroken_run(ranks, stage):
    _, found = ranks
    unbroken = found["lora", stage]
    again = found["resumed", stage, stage]
    assert again[0] == unbroken[0][4:]
    assert all(torch.equal(value, unbroken[1][name]) for name, value in again[1].items())
    other = found["resumed", stage, 5 - stage]
    assert other[0] == pytest.approx(unbroken[0][4:], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_goes_on_in_one_process(ranks, stage):
    weights, slots = ranks[1]["saved", stage]
    model = model_of("lora")
    load_trainable_state(model, weights)
    optimizer = make(model)
    load_optimizer_state(optimizer, model, slots)
    again = run(model, rows_of("lora"), **course("lora", batch_rows=1, accumulate=2), start=2, optimizer=optimizer)
    assert numbers(again) == pytest.approx(ranks[1]["lora", stage][0][4:], rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_saved_is_whole(ranks, stage):
    from safetensors.torch import load_file

    found = load_file(ranks[0] / f"lora{stage}" / "adapter_model.safetensors")
    start = {name.replace(".default", ""): value for name, value in trainable_state(model_of("lora")).items()}
    assert found.keys() == start.keys()
    assert all(torch.equal(value, start[name]) for name, value in found.items())
