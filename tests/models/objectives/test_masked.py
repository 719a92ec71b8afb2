"""Masking follows BERT's and ViLBERT's rates; its losses are the formulas; negatives are strangers."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.models.objectives.masked import (
    TokenMasking,
    mask_regions,
    mask_tokens,
    masked_region_loss,
    masked_token_loss,
    match_loss,
    match_pairs,
)
from mmtune.models.objectives.negatives import other_rows

MASKING = TokenMasking(mask_id=999, vocabulary=900)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_tokens_are_masked_80_10_10_of_15_percent():
    ids = torch.randint(900, (400, 100), generator=generator(1))
    maskable = torch.ones_like(ids, dtype=torch.bool)
    maskable[:, :10] = False
    read, labels = mask_tokens(ids, maskable, MASKING, generator())
    chosen = labels != -100
    assert not chosen[:, :10].any() and torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(read[~chosen], ids[~chosen])
    shares = {
        "chosen": (chosen[:, 10:].float().mean().item(), 0.15),
        "mask": ((read[chosen] == 999).float().mean().item(), 0.8),
        # A random draw hits the token itself once in 900.
        "kept": ((read[chosen] == ids[chosen]).float().mean().item(), 0.1 + 0.1 / 900),
    }
    for name, (found, wanted) in shares.items():
        count = maskable.sum().item() if name == "chosen" else chosen.sum().item()
        assert abs(found - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / count), name
    again, _ = mask_tokens(ids, maskable, MASKING, generator())
    assert torch.equal(read, again)


def test_regions_are_zeroed_nine_times_in_ten():
    features = torch.randn(300, 40, 3)
    valid = torch.arange(40) < 30
    read, chosen = mask_regions(features, valid.expand(300, -1), generator())
    zeroed = (read == 0).all(-1)
    assert not chosen[:, 30:].any() and not (zeroed & ~chosen).any()
    assert abs(chosen[:, :30].float().mean() - 0.15) < 0.02
    assert abs(zeroed[chosen].float().mean() - 0.9) < 0.03
    assert torch.equal(read[~zeroed], features[~zeroed])


def test_losses_are_the_formulas():
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, -100, 2], [-100, -100, 0]])
    wanted = -sum(logits[b, t].log_softmax(-1)[labels[b, t]] for b, t in ((0, 0), (0, 2), (1, 2))) / 3
    torch.testing.assert_close(masked_token_loss(logits, labels), wanted)
    predicted, features = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    chosen = torch.tensor([[True, False, False], [False, True, False]])
    wanted = ((predicted - features)[[0, 1], [0, 1]] ** 2).sum() / 2
    torch.testing.assert_close(masked_region_loss(predicted, features, chosen), wanted)
    one = match_loss(torch.tensor([2.0, -1.0]), torch.tensor([True, False]))
    torch.testing.assert_close(one, torch.tensor((math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2))


def test_nothing_masked_is_a_loss_of_zero_with_a_gradient():
    x = torch.randn(1, 2, 3, requires_grad=True)
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    total = masked_token_loss(x, torch.full((1, 2), -100)) + masked_region_loss(x, x.detach(), nothing)
    assert total == 0
    total.backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(0, 1000))
def test_negatives_are_strangers_wherever_there_is_one(groups, seed):
    group = torch.tensor(groups)
    other, found = other_rows(group, generator(seed))
    for row, mine in enumerate(groups):
        assert bool(found[row]) == any(theirs != mine for theirs in groups)
        assert groups[other[row]] != mine if found[row] else other[row] == row
    shown, matched = match_pairs(group, generator(seed))
    assert torch.equal(group[shown] == group, matched)
    assert torch.equal(shown[matched], torch.arange(len(group))[matched])


def test_half_the_pairs_are_swapped_and_strangers_are_drawn_alike():
    group = torch.arange(4).repeat(500)
    _, matched = match_pairs(group, generator())
    assert abs(matched.float().mean() - 0.5) < 0.05
    other, _ = other_rows(group, generator())
    counts = torch.bincount(group[other[group == 0]], minlength=4)
    assert counts[0] == 0 and counts[1:].min() > 120
