"""The gate mixes probabilities: one-hot is a branch to the last bit, absent branches weigh nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from mmtune.models.fusion.gate import DecisionGate, gate_entropy, mix, modality_dropout, one_hot_gate


def branches(count=3, rows=4, vocabulary=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, rows, vocabulary, generator=generator)
    return list(functional.log_softmax(logits, dim=-1))


def test_the_mixture_is_that_of_the_probabilities():
    gate = DecisionGate(3)
    torch.nn.init.normal_(gate.bias)
    log_probs = branches()
    log_gate = gate(torch.ones(4, 3, dtype=torch.bool))
    wanted = sum(log_gate.exp()[:, k, None] * log_probs[k].exp() for k in range(3))
    found = mix(log_gate, log_probs)
    torch.testing.assert_close(found.exp(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(4), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("branch", [0, 1, 2])
def test_one_hot_is_the_branch_to_the_last_bit(branch):
    log_probs = branches()
    found = mix(one_hot_gate(branch, torch.ones(4, 3, dtype=torch.bool)), log_probs)
    assert torch.equal(found, log_probs[branch])


def test_the_only_modality_present_is_the_unimodal_branch():
    gate, log_probs = DecisionGate(3), branches()
    torch.nn.init.normal_(gate.bias)
    present = torch.tensor([[False, True, False]]).expand(4, -1)
    assert torch.equal(mix(gate(present), log_probs), log_probs[1])


def test_absent_branches_weigh_nothing_and_get_no_gradient():
    gate = DecisionGate(3)
    torch.nn.init.normal_(gate.bias)
    present = torch.tensor([[True, True, False], [True, False, True]])
    log_gate = gate(present)
    assert (log_gate[~present] == -torch.inf).all()
    torch.testing.assert_close(log_gate.exp().sum(-1), torch.ones(2))
    free = functional.softmax(gate.bias, dim=0)
    torch.testing.assert_close(log_gate[0, :2].exp(), free[:2] / free[:2].sum())
    log_probs = [part[:2].clone().requires_grad_() for part in branches()]
    mix(log_gate, log_probs)[:, 0].sum().backward()
    assert gate.bias.grad.isfinite().all()
    assert log_probs[2].grad[0].abs().max() == 0 and log_probs[2].grad[1].abs().max() > 0


def test_a_row_without_any_modality_is_finite():
    gate = DecisionGate(2)
    made = mix(gate(torch.zeros(4, 2, dtype=torch.bool)), branches(2))
    assert made.isfinite().all()
    made.sum().backward()
    assert gate.bias.grad.isfinite().all()


def test_the_instruction_moves_the_gate():
    gate = DecisionGate(2, instruction_width=5)
    present, instructions = torch.ones(3, 2, dtype=torch.bool), torch.randn(3, 5)
    torch.testing.assert_close(gate(present, instructions).exp(), torch.full((3, 2), 0.5))
    torch.nn.init.normal_(gate.condition.weight)
    weights = gate(present, instructions)
    assert (weights[0] - weights[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="conditioned by the instruction"):
        gate(present)


def test_a_lead_starts_with_nine_tenths_and_can_be_restored():
    gate, present = DecisionGate(3, lead=0), torch.ones(1, 3, dtype=torch.bool)
    wanted = torch.tensor([[0.9, 0.05, 0.05]])
    torch.testing.assert_close(gate(present).exp(), wanted)
    torch.nn.init.normal_(gate.bias)
    gate.reset_parameters()
    torch.testing.assert_close(gate(present).exp(), wanted)


def test_entropy_is_log_k_then_zero():
    present = torch.ones(2, 4, dtype=torch.bool)
    torch.testing.assert_close(gate_entropy(DecisionGate(4)(present)), torch.full((2,), math.log(4)))
    assert torch.equal(gate_entropy(one_hot_gate(1, present)), torch.zeros(2))


def test_the_gate_learns_the_better_branch():
    gate, targets = DecisionGate(2), torch.tensor([0, 1, 2, 3])
    good = functional.log_softmax(5.0 * functional.one_hot(targets, 7).float(), dim=-1)
    bad = branches(1)[0]
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.1)
    for _ in range(60):
        loss = functional.nll_loss(mix(gate(torch.ones(4, 2, dtype=torch.bool)), [bad, good]), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert gate.bias.softmax(0)[1] > 0.95


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.integers(1, 4))
def test_dropout_never_drops_all_and_never_adds(seed, rate, modalities):
    present = torch.rand(20, modalities, generator=torch.Generator().manual_seed(seed)) < 0.7
    kept = modality_dropout(present, rate, torch.Generator().manual_seed(seed))
    assert not (kept & ~present).any()
    assert torch.equal(kept.any(-1), present.any(-1))
    assert torch.equal(kept, modality_dropout(present, rate, torch.Generator().manual_seed(seed)))
    if rate == 0:
        assert torch.equal(kept, present)


def test_dropout_keeps_its_rate_and_favours_no_modality():
    kept = modality_dropout(torch.ones(20_000, 3, dtype=torch.bool), 0.5, torch.Generator().manual_seed(0))
    # A modality stays by its own draw (1/2), or as the last of three that all fell (1/8, shared by three).
    torch.testing.assert_close(kept.float().mean(0), torch.full((3,), 0.5 + 0.125 / 3), atol=0.012, rtol=0)
