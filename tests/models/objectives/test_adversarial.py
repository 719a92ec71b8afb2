"""The game's value is 2 JSD - log 4 at the best discriminator; reversal is the exact negated gradient."""

import math

import pytest
import torch

from mmtune.models.objectives.adversarial import (
    CodeGenerator,
    Discriminator,
    GameFacts,
    discriminator_loss,
    encoder_loss,
    game_facts,
    game_warnings,
    gradient_penalty,
    reverse_gradient,
)
from mmtune.models.objectives.autoencoder import Autoencoder
from mmtune.models.objectives.weighted import weighted_sum


def take_step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def draw(means, rows, generator):
    codes = torch.cat([torch.randn(rows, 1, generator=generator) + mean for mean in means])
    return codes, torch.arange(len(means)).repeat_interleave(rows)


def best_value(means):
    """sum_m E_m[log p_m / sum p] by integration over a fine grid."""
    x = torch.linspace(-12, 14, 200_001, dtype=torch.float64)
    densities = torch.stack([torch.exp(-((x - mean) ** 2) / 2) / math.sqrt(2 * math.pi) for mean in means])
    shares = densities / densities.sum(0)
    return torch.trapezoid((densities * shares.clamp(min=1e-300).log()).sum(0), x).item()


def trained_value(means, steps=500):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    discriminator = Discriminator(1, len(means), 16)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        codes, modality = draw(means, 512, generator)
        loss = discriminator_loss(discriminator(codes), modality)
        take_step(optimizer, loss)
        schedule.step()
    codes, modality = draw(means, 100_000, generator)
    names = tuple("abc"[: len(means)])
    return game_facts(discriminator(codes), modality, codes, names)


def test_the_gradient_penalty_of_a_line_is_half_its_squared_slope():
    line = torch.nn.Linear(3, 2)
    codes, modality = torch.randn(10, 3, requires_grad=True), torch.arange(10) % 2
    found = gradient_penalty(line, codes, modality)
    torch.testing.assert_close(found, 0.5 * (line.weight[0] - line.weight[1]).square().sum())
    found.backward()
    # Only the discriminator pays.
    assert codes.grad is None
    torch.testing.assert_close(line.weight.grad[0], (line.weight[0] - line.weight[1]).detach())


def test_the_gradient_penalty_is_the_slope_of_the_log_odds_with_each_modality_weighed_the_same():
    torch.manual_seed(0)
    discriminator = Discriminator(2, 3, 8).double()
    codes, modality = torch.randn(7, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 1, 2, 2, 0])

    def odds(code, true):
        share = discriminator(code).softmax(-1)[true]
        return float((share / (1 - share)).log())

    step = 1e-5 * torch.eye(2, dtype=torch.float64)
    with torch.no_grad():
        slopes = [
            sum(((odds(code + one, true) - odds(code - one, true)) / 2e-5) ** 2 for one in step)
            for code, true in zip(codes, modality.tolist(), strict=True)
        ]
    each = [sum(own for own, true in zip(slopes, modality, strict=True) if true == m) for m in range(3)]
    wanted = 0.5 * (each[0] / 2 + each[1] / 3 + each[2] / 2) / 3
    assert float(gradient_penalty(discriminator, codes, modality).detach()) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("means", [(0.0, 1.0), (0.0, 2.0), (0.0, 1.0, 3.0)])
def test_the_trained_discriminator_reaches_the_divergence(means):
    assert trained_value(means).value == pytest.approx(best_value(means), abs=0.01)


def test_equal_distributions_give_minus_log_four():
    facts = trained_value((0.0, 0.0))
    assert facts.value == pytest.approx(-math.log(4), abs=0.005)
    assert facts.accuracy == pytest.approx(0.5, abs=0.02)


def test_the_grid_knows_the_divergence_of_two_gaussians():
    # 2 JSD - log 4 for N(0, 1) and N(1, 1); JSD by its definition as a mean of two KL divergences.
    x = torch.linspace(-12, 14, 200_001, dtype=torch.float64)
    p, q = (torch.exp(-((x - mean) ** 2) / 2) / math.sqrt(2 * math.pi) for mean in (0.0, 1.0))
    middle = (p + q) / 2
    jsd = sum(torch.trapezoid(part * (part / middle).log(), x) for part in (p, q)) / 2
    assert best_value((0.0, 1.0)) == pytest.approx(2 * jsd.item() - math.log(4), abs=1e-9)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_reversal_is_the_exact_negated_gradient(weight):
    torch.manual_seed(0)
    encoder, discriminator = torch.nn.Linear(4, 3), Discriminator(3, 2)
    x, modality = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])

    def gradients(codes):
        loss = discriminator_loss(discriminator(codes), modality)
        return torch.autograd.grad(loss, [*encoder.parameters(), *discriminator.parameters()])

    plain, turned = gradients(encoder(x)), gradients(reverse_gradient(encoder(x), weight))
    for a, b in zip(plain[:2], turned[:2], strict=True):
        torch.testing.assert_close(b, -weight * a, rtol=1e-5, atol=1e-7)
    for a, b in zip(plain[2:], turned[2:], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(reverse_gradient(x, weight), x)
    if weight == 1.0:
        assert all(torch.equal(b, -a) for a, b in zip(plain[:2], turned[:2], strict=True))


def test_reversal_is_the_minimax_turn_of_the_encoders():
    torch.manual_seed(0)
    discriminator, modality = Discriminator(3, 2), torch.tensor([0, 1, 0, 0])
    codes = torch.randn(4, 3, requires_grad=True)
    (reversed_,) = torch.autograd.grad(discriminator_loss(discriminator(reverse_gradient(codes)), modality), codes)
    (minimax,) = torch.autograd.grad(encoder_loss(discriminator(codes), modality, "minimax"), codes)
    torch.testing.assert_close(reversed_, minimax)


def test_non_saturating_is_steep_where_minimax_is_flat():
    logits = torch.tensor([[30.0, 0.0], [0.0, 30.0]], requires_grad=True)
    modality = torch.tensor([0, 1])
    slopes = {
        form: torch.autograd.grad(encoder_loss(logits, modality, form), logits)[0].abs().max().item()
        for form in ("minimax", "non_saturating")
    }
    assert slopes["minimax"] < 1e-9 and slopes["non_saturating"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="not 'hinge'"):
        encoder_loss(logits, modality, "hinge")


def test_modalities_count_the_same_whatever_their_rows():
    logits = torch.randn(5, 2)
    modality = torch.tensor([0, 0, 0, 0, 1])
    loss = torch.nn.functional.cross_entropy(logits, modality, reduction="none")
    torch.testing.assert_close(discriminator_loss(logits, modality), (loss[:4].mean() + loss[4]) / 2)
    alone = discriminator_loss(logits[:4], modality[:4])
    torch.testing.assert_close(alone, loss[:4].mean())


@pytest.mark.parametrize("form", ["minimax", "non_saturating"])
def test_taking_turns_makes_two_gaussians_alike(form):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    discriminator, shift = Discriminator(1, 2, 16), torch.nn.Parameter(torch.tensor(2.0))
    players = torch.optim.Adam(discriminator.parameters(), lr=1e-2), torch.optim.Adam([shift], lr=1e-2)
    for _ in range(500):
        codes, modality = draw((0.0, 0.0), 128, generator)
        codes = codes + shift * modality[:, None]
        loss = discriminator_loss(discriminator(codes.detach()), modality, smoothing=0.1)
        take_step(players[0], loss)
        take_step(players[1], encoder_loss(discriminator(codes), modality, form))
    assert abs(shift.item()) < 0.3


def train_pair(adversarial_weight):
    """Two linear encoders that reconstruct, with or without a game; returns their weights."""
    torch.manual_seed(0)
    model = Autoencoder({"one": 6, "two": 5}, 3)
    features = {"one": torch.randn(32, 6), "two": torch.randn(32, 5)}
    discriminator = Discriminator(3, 2)
    parameters = [*model.parameters(), *(discriminator.parameters() if adversarial_weight else ())]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    weights = {"reconstruction": 1.0} if adversarial_weight is None else {"reconstruction": 1.0, "adversarial": 0.0}
    if adversarial_weight:
        weights["adversarial"] = adversarial_weight
    for _ in range(20):
        losses = {"reconstruction": sum(model.losses(features).values())}
        if adversarial_weight is not None:
            codes = torch.cat([encoder(features[name]) for name, encoder in model.encoders.items()])
            modality = torch.arange(2).repeat_interleave(32)
            losses["adversarial"] = discriminator_loss(discriminator(reverse_gradient(codes)), modality)
        take_step(optimizer, weighted_sum(losses, weights))
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_weight_zero_is_bit_for_bit_the_run_without_it():
    without, zero, some = train_pair(None), train_pair(0.0), train_pair(0.5)
    assert torch.equal(without, zero)
    assert not torch.equal(without, some)


def test_the_generator_fills_in_a_missing_code():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(4, 4))[0]
    made = CodeGenerator(4, 2)
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    for _ in range(300):
        present = torch.randn(64, 4, generator=generator)
        noise = torch.randn(64, 2, generator=generator)
        loss = (made(present, noise) - present @ turn).square().sum(-1).mean()
        take_step(optimizer, loss)
    # The codes have a mean squared norm of 4; the mean code would miss by all of it.
    assert loss.item() < 0.4
    noise = torch.randn(2, 1, 2, generator=generator)
    assert not torch.equal(made(present[:1], noise[0]), made(present[:1], noise[1]))


def test_facts_and_their_warnings():
    codes = torch.tensor([[0.0, 0.0], [2.0, 4.0], [1.0, 1.0], [1.0, 1.0]])
    modality = torch.tensor([0, 0, 1, 1])
    logits = 20.0 * torch.nn.functional.one_hot(modality, 2)
    facts = game_facts(logits, modality, codes, ("text", "image"))
    assert facts.accuracy == 1.0 and facts.variance == {"text": 2.5, "image": 0.0}
    said = game_warnings(facts)
    assert len(said) == 2 and "100.0%" in said[0] and "image have collapsed" in said[1]
    assert game_warnings(GameFacts(0.6, -1.3, {"text": 0.5})) == []
    assert "not finite" in game_warnings(GameFacts(0.6, math.nan, {}))[0]
