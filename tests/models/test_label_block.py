"""The last block for label tokens alone, as two operations: numbers and gradients are those of the whole block."""

import pytest
import torch

from mmtune.models.decoder_block import FusedBlock, fused_blocks
from mmtune.models.label_tokens import only_label_tokens, tokens_to_come
from tests.models.test_decoder_block import FAMILIES, TOKENS, adapted, assert_same, inputs


@pytest.fixture
def runs(monkeypatch):
    """Whether each call of the last block ran as two operations."""
    found, own = [], FusedBlock.run

    def noted(fused, hidden, options, bears=None):
        made = own(fused, hidden, options, bears)
        if bears is not None:
            found.append(made is not None)
        return made

    monkeypatch.setattr(FusedBlock, "run", noted)
    return found


def bearing(*places):
    bears = torch.zeros(len(places), TOKENS, dtype=torch.bool)
    for row, own in enumerate(places):
        bears[row, own] = True
    return bears


def results(model, bears, given):
    model.zero_grad()
    with only_label_tokens(model, bears):
        logits = model(**given).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["k_proj", "up_proj", "o_proj"]])
@pytest.mark.parametrize("bears", [bearing([7, 9, 10], [8]), bearing([], [0, 12]), bearing(range(13), [5])])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_are_those_of_whole_blocks(family, bears, targets, runs):
    model, given = adapted(*FAMILIES[family], targets), inputs()
    wanted = results(model, bears, given)
    with fused_blocks(model):
        found = results(model, bears, given)
    assert runs == [True]
    # Gradients of keys are differences of nearly equal sums.
    assert_same(found, wanted, 2e-5)
    assert not any("forward" in vars(layer) for layer in model.base_model.model.model.layers)


def test_inputs_that_do_not_train_need_no_gradient(runs):
    config = type(FAMILIES["llama"][1])(**{**FAMILIES["llama"][1].to_dict(), "num_hidden_layers": 1})
    model, given, bears = adapted(FAMILIES["llama"][0], config), inputs(), bearing([7, 9], [8])
    wanted = results(model, bears, given)
    with fused_blocks(model):
        assert_same(results(model, bears, given), wanted)
    assert runs == [True]


@pytest.mark.parametrize("bears", [bearing([], []), bearing([7], [8])])
def test_a_call_that_does_not_fit_runs_part_by_part(bears, runs):
    model, given = adapted(*FAMILIES["llama"]), inputs()
    given["attention_mask"] = inputs(rows=1)["attention_mask"] if bears.any() else given["attention_mask"]
    with torch.no_grad():
        with only_label_tokens(model, bears):
            wanted = model(**given).logits
        with fused_blocks(model), only_label_tokens(model, bears):
            torch.testing.assert_close(model(**given).logits, wanted)
    assert not any(runs)


def test_beginnings_of_rows_run_part_by_part(runs):
    model, given = adapted(*FAMILIES["llama"]), inputs()
    longer = torch.cat((torch.zeros(2, 4, dtype=torch.bool), bearing([1], [2])), dim=1)
    with torch.no_grad(), tokens_to_come(4):
        with only_label_tokens(model, longer):
            wanted = model(**given).logits
        with fused_blocks(model), only_label_tokens(model, longer):
            torch.testing.assert_close(model(**given).logits, wanted)
    assert not runs
