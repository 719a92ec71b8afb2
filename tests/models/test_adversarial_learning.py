"""The minimax game on real written and spoken digits: codes lose their modality and keep their class.

What falls is the accuracy of the discriminator that plays, on held-out digits. A fresh MLP that may study the
final codes still tells the modalities apart (95.7 % and over in every run): the game hides a modality from its
opponent and does not erase it.
"""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional

from mmtune.models.objectives.adversarial import Discriminator, discriminator_loss, encoder_loss, game_facts
from tests.models.digits import pairs, spoken_digits, written_digits

pytestmark = pytest.mark.slow
CODE, ROWS, STEPS = 16, 64, 500


def encoder(width):
    return nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, CODE))


def take_step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def train(written, spoken, weight):
    """Two encoders under one class head; returns them and the discriminator they played against."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    encoders, head, discriminator = (encoder(64), encoder(1280)), nn.Linear(CODE, 10), Discriminator(CODE, 2)
    learned = [*encoders[0].parameters(), *encoders[1].parameters(), *head.parameters()]
    # Adam's usual memory of 0.9 makes the two players circle each other.
    optimizer = torch.optim.AdamW(learned, lr=2e-3, betas=(0.5, 0.99), weight_decay=0.01)
    opponent = torch.optim.Adam(discriminator.parameters(), lr=3e-3, betas=(0.5, 0.99))
    modality = torch.arange(2).repeat_interleave(ROWS)
    for step in range(STEPS):
        one, other, *digits = pairs(written, spoken, ROWS, generator)
        codes = torch.cat([run(part.flatten(1)) for run, part in zip(encoders, (one, other), strict=True)])
        take_step(opponent, discriminator_loss(discriminator(codes.detach()), modality, smoothing=0.1))
        loss = 2 * functional.cross_entropy(head(codes), torch.cat(digits))
        ramp = min(1.0, 2 * step / STEPS)
        take_step(optimizer, loss + weight * ramp * encoder_loss(discriminator(codes), modality, "minimax"))
    return encoders, discriminator


def recall_at_1(asking, answering, digit, other_digit):
    """Share of codes whose nearest code of the other modality is of the same digit."""
    cosines = functional.normalize(asking, dim=-1) @ functional.normalize(answering, dim=-1).T
    return (other_digit[cosines.argmax(1)] == digit).float().mean().item()


@torch.no_grad()
def scores(encoders, discriminator, train_parts, test_parts):
    known, held_out = (
        [run(part.tokens.flatten(1)) for run, part in zip(encoders, parts, strict=True)]
        for parts in (train_parts, test_parts)
    )
    modality = torch.cat([torch.full((len(codes),), index) for index, codes in enumerate(held_out)])
    codes, digits = torch.cat(held_out), [part.digit for part in test_parts]
    probes = []
    for index, part in enumerate(train_parts):
        probe = LogisticRegression(max_iter=20_000).fit(known[index], part.digit)
        probes.append(probe.score(held_out[index], digits[index]))
    recalls = recall_at_1(*held_out, *digits), recall_at_1(*held_out[::-1], *digits[::-1])
    facts = game_facts(discriminator(codes), modality, codes, ("written", "spoken"))
    return facts, probes, recalls


def test_the_game_hides_the_modality_keeps_the_class_and_aligns(shared_datasets):
    parts = list(zip(written_digits(), spoken_digits(shared_datasets), strict=True))
    before, plain_probes, plain_recalls = scores(*train(*parts[0], 0.0), *parts)
    after, probes, recalls = scores(*train(*parts[0], 0.5), *parts)
    # How far the game comes depends on rounding: at most .65 on one machine, .84 on another.
    assert before.accuracy > 0.98 and after.accuracy <= 0.9, (before, after)
    assert all(found >= plain - 0.03 for found, plain in zip(probes, plain_probes, strict=True)), (probes, plain_probes)
    assert sum(recalls) > sum(plain_recalls) + 0.04, (recalls, plain_recalls)
    assert min(after.variance.values()) > 0.01
