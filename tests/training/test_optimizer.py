"""The learning rate equals transformers' schedules; the optimizer state survives a round trip."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

from mmtune.training.optimizer import learning_rate, load_optimizer_state, make_optimizer, optimizer_state


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_after_warm_up_it_equals_transformers(schedule):
    parameter = torch.nn.Parameter(torch.zeros(1))
    name = "constant_with_warmup" if schedule == "constant" else schedule
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=10, num_training_steps=100)
    for step in range(100):
        ours = learning_rate(step, peak=0.5, total=100, warmup=10, schedule=schedule)
        if step >= 10:
            assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        else:
            # Ours starts above zero, so that the first step moves something.
            assert 0 < ours < 0.5
        optimizer.step()
        theirs.step()


def test_warm_up_as_a_share():
    assert learning_rate(4, peak=1.0, total=100, warmup=0.05, schedule="linear") < 1.0
    assert learning_rate(5, peak=1.0, total=100, warmup=0.05, schedule="linear") == 1.0


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon"])
def test_state_round_trip_continues_identically(name):
    def run(steps, state=None, weights=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(96, 64)
        optimizer = make_optimizer(model, name=name, rate=0.1, weight_decay=0.01, beta2=0.99)
        if state:
            model.load_state_dict(weights)
            load_optimizer_state(optimizer, model, state)
        for step in steps:
            model(torch.full((1, 96), float(step))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    whole, _ = run(range(1, 7))
    half, optimizer = run(range(1, 4))
    weights = {name: value.clone() for name, value in half.state_dict().items()}
    resumed, _ = run(range(4, 7), optimizer_state(optimizer, half), weights)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def tiny_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=30, tie_word_embeddings=False, **sizes))


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    model = tiny_llama()
    muon, adamw = make_optimizer(model, name="muon", rate=0.01, weight_decay=0.1, beta2=0.99).parts
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_muon = {names[p] for group in muon.param_groups for p in group["params"]}
    by_adamw = {names[p] for group in adamw.param_groups for p in group["params"]}
    assert by_muon == {name for name in names.values() if name.endswith("proj.weight")}
    assert by_adamw == set(names.values()) - by_muon
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= by_adamw


def test_muon_steps_as_torch_muon_and_torch_adamw_do():
    ours, theirs = tiny_llama(), tiny_llama()
    optimizer = make_optimizer(ours, name="muon", rate=0.01, weight_decay=0.0, beta2=0.99)
    hidden = [p for name, p in theirs.named_parameters() if name.endswith("proj.weight")]
    rest = [p for name, p in theirs.named_parameters() if not name.endswith("proj.weight")]
    parts = [
        torch.optim.Muon(hidden, lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.01, weight_decay=0.0, betas=(0.9, 0.99), fused=True),
    ]
    ids = torch.arange(8)[None]
    for _ in range(3):
        for model, steps in ((ours, [optimizer]), (theirs, parts)):
            model(input_ids=ids, labels=ids).loss.backward()
            for each in steps:
                each.step()
                each.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_eight_bit_moments_follow_adamw_in_a_quarter_of_its_memory():
    pytest.importorskip("bitsandbytes", reason="adamw_8bit is an extra: pip install mmtune[qlora]")
    models = {name: torch.nn.Linear(64, 64, bias=False) for name in ("adamw", "adamw_8bit")}
    models["adamw_8bit"].load_state_dict(models["adamw"].state_dict())
    start = models["adamw"].weight.detach().clone()
    kept = {}
    for name, model in models.items():
        optimizer = make_optimizer(model, name=name, rate=0.01, weight_decay=0.0, beta2=0.99)
        for step in range(20):
            torch.manual_seed(step)
            x = torch.randn(32, 64)
            (model(x) - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        slots = optimizer_state(optimizer, model)
        kept[name] = sum(value.nbytes for value in slots.values() if value.numel() == model.weight.numel())
    moved = {name: model.weight.detach() - start for name, model in models.items()}
    apart = (moved["adamw"] - moved["adamw_8bit"]).norm() / moved["adamw"].norm()
    assert 0 < apart < 0.05
    assert kept["adamw_8bit"] * 4 == kept["adamw"]
