"""Two gloo processes that share a model's weights train as one process that holds them all."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import multiprocessing
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))
from course import LENGTH, Rows, run, tiny_model
from test_ranks import MIXED, init

from mmtune.models.adapter import add_lora, load_trainable_state, save_tuned, train_fully, trainable_state, whole_state
from mmtune.models.method import with_method
from mmtune.models.spread import spread_like, whole, without_gradients
from mmtune.training.loss import answer_loss
from mmtune.training.optimizer import load_optimizer_state, make_optimizer, optimizer_state
from mmtune.training.plan import Plan, TreeSizes
from mmtune.training.sharding import gradient_norm, shard_language_model

# What trains; pictures come on both processes, on one, on none.
CASES = (
    "full",
    "full, pictures on one process alone",
    "vision alone",
    "lora",
    "lora, computed again",
    "lora in bf16",
    "prompt",
    "ia3",
)


def model_of(case):
    model = tiny_model()
    if case == "vision alone":
        model = train_fully(model, ["vision"])
        model.enable_input_require_grads()
        return model
    if case.startswith("full"):
        return train_fully(model, ["llm", "projector", "vision"])
    if case in ("prompt", "ia3"):
        return with_method(model, case, towers=["llm"], lora={}, virtual_tokens=3, base_path="")
    if case == "lora in bf16":
        model = model.to(torch.bfloat16)
    if case == "lora, computed again":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return add_lora(model, towers=["llm", "vision"], targets=None, r=4, alpha=8)


def rows_of(case):
    """Pictures here and there; or in those rows alone that fall to the first of two processes."""
    if case != "full, pictures on one process alone":
        return Rows(count=8, pictures=MIXED)
    plan = Plan(
        TreeSizes(np.ones(8, int), np.full(8, LENGTH), 1 + np.arange(8) % 3, np.zeros(8, int)), 0, 10**6, 1, 2, 1.0
    )
    own = [step[position] for step in plan.steps() for position, _ in plan.shares(step, 0, 2)]
    assert len(own) == 4
    return Rows(count=8, pictures=frozenset(np.concatenate(own).tolist()))


def course(case, **split):
    precision = "bf16" if case == "lora in bf16" else "no"
    return {"rate": 0.01, "steps": 4, "clip": 0.1, "precision": precision, **split}


def numbers(result):
    """Loss and gradient norm of every step; Adam alone would not notice a gradient that is half as long."""
    rows = [json.loads(line) for line in result.outcome.metrics.splitlines()]
    return [row[name] for row in rows for name in ("loss", "grad_norm")]


def ways(case):
    """ZeRO-3, and ZeRO-2 where it is cheap to try; resting in the CPU's memory once."""
    return (False, True) if case in ("full", "lora") else (False,)


def sharded(case, keep_gathered=False, offload=False):
    model = model_of(case)
    shard_language_model(model, torch.device("cpu"), keep_gathered=keep_gathered, offload=offload)
    return model


def two_ranks(rank, folder):
    init(rank, folder)
    folder = Path(folder)
    found = {}
    for case in CASES:
        for keep_gathered in ways(case):
            model = sharded(case, keep_gathered, offload=case == "full" and keep_gathered)
            spread = [p for p in model.parameters() if isinstance(p, DTensor)]
            assert len(spread) > 10
            assert sum(p.to_local().numel() for p in spread) < 0.6 * sum(p.numel() for p in spread)
            result = run(model, rows_of(case), **course(case, batch_rows=1))
            state = trainable_state(model)
            found[case, keep_gathered] = (numbers(result), {name: value.clone() for name, value in state.items()})
    # Stopped after two steps and resumed, here and, by the test, in one process.
    model = sharded("lora")
    first = run(model, Rows(count=8, pictures=MIXED), **course("lora", batch_rows=1, steps=2))
    saved = trainable_state(model), optimizer_state(first.optimizer, model)
    model = sharded("lora")
    load_trainable_state(model, saved[0])
    optimizer = make_optimizer(model, rate=0.01, weight_decay=0.0, beta2=0.99)
    load_optimizer_state(optimizer, model, saved[1])
    again = run(model, Rows(count=8, pictures=MIXED), **course("lora", batch_rows=1), start=2, optimizer=optimizer)
    found["resumed"] = (numbers(again), trainable_state(model))
    # A pass without gradients leaves every weight in parts.
    full = sharded("full", keep_gathered=True)
    parts = [name for name, parameter in full.named_parameters() if isinstance(parameter, DTensor)]
    with without_gradients(full):
        answer_loss(full, Rows(count=8, pictures=MIXED).batch(range(2)))
    assert parts == [name for name, parameter in full.named_parameters() if isinstance(parameter, DTensor)]
    # What is saved is whole.
    full = sharded("full")
    state = whole_state(full)
    adapted = sharded("lora")
    adapter = whole_state(adapted)
    # A norm over spread and whole gradients.
    for parameter in full.parameters():
        parameter.grad = spread_like(torch.ones(parameter.shape), parameter)
    norm, count = gradient_norm(full.parameters(), 1.0), sum(p.numel() for p in full.parameters())
    assert norm == pytest.approx(count**0.5, rel=1e-5)
    assert gradient_norm(full.parameters(), None) == pytest.approx(1.0, rel=1e-4)
    for parameter in full.parameters():
        assert torch.equal(whole(spread_like(whole(parameter.detach()), parameter)), whole(parameter.detach()))
    if rank == 0:
        torch.save((found, saved), folder / "found.pt")
        save_tuned(full, folder / "full", state)
        save_tuned(adapted, folder / "lora", adapter)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(two_ranks, args=(str(folder),), nprocs=2)
    found, saved = torch.load(folder / "found.pt")
    return folder, found, saved


@pytest.mark.parametrize("case", CASES)
def test_as_one_process_with_twice_the_rows(ranks, case):
    model = model_of(case)
    alone = run(model, rows_of(case), **course(case, batch_rows=1, accumulate=2))
    expected = trainable_state(model)
    tight = {"rtol": 2e-2, "atol": 4e-3} if case == "lora in bf16" else {"rtol": 1e-4, "atol": 1e-5}
    for keep_gathered in ways(case):
        numbers_found, weights = ranks[1][case, keep_gathered]
        assert numbers_found == pytest.approx(numbers(alone), rel=5e-2 if case == "lora in bf16" else 1e-4)
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            # The gradient of a key's bias is rounding alone, which Adam's step makes as large as any other.
            assert name.endswith("k_proj.bias") or torch.allclose(weights[name], value, **tight), name


def test_resumed_on_the_same_processes_it_is_the_unbroken_run(ranks):
    _, found, _ = ranks
    assert found["resumed"][0] == found["lora", False][0][4:]
    assert all(torch.equal(value, found["lora", False][1][name]) for name, value in found["resumed"][1].items())


def test_a_checkpoint_of_shards_goes_on_in_one_process(ranks):
    _, found, (weights, slots) = ranks
    model = model_of("lora")
    load_trainable_state(model, weights)
    optimizer = make_optimizer(model, rate=0.01, weight_decay=0.0, beta2=0.99)
    load_optimizer_state(optimizer, model, slots)
    rows = Rows(count=8, pictures=MIXED)
    again = run(model, rows, **course("lora", batch_rows=1, accumulate=2), start=2, optimizer=optimizer)
    assert numbers(again) == pytest.approx(found["lora", False][0][4:], rel=1e-4)


def test_what_is_saved_is_whole(ranks):
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration

    folder, _, _ = ranks
    plain = tiny_model()
    loaded = LlavaForConditionalGeneration.from_pretrained(folder / "full")
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), loaded.parameters(), strict=True))
    assert '"LlavaForConditionalGeneration"' in (folder / "full" / "config.json").read_text()
    adapted = PeftModel.from_pretrained(plain, folder / "lora")
    for name, value in trainable_state(model_of("lora")).items():
        assert torch.equal(adapted.state_dict()[name], value), name
