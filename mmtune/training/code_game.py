"""The minimax games over codes: of which modality is it, and is it a real one or filled in?

The first hides a code's modality from a discriminator. The second is a conditional adversarial net (Mirza and
Osindero 2014) with a squared error beside it, as in pix2pix (Isola et al. 2017): from the code of a part that is
there, and noise, a generator makes the code of one that is missing; a judge that sees both tells real from made.
In the first, codes may be shown through noise (instance noise, Sonderby et al. 2017, arXiv:1610.04490): codes of two
modalities seldom lie on the same places, and on what lies apart a discriminator is sure, whatever encoders do.
Shapes: B rows, N codes, C width of a code, Z width of the noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from mmtune.models.objectives.adversarial import (
    CodeGenerator,
    Discriminator,
    discriminator_loss,
    encoder_loss,
    game_facts,
    gradient_penalty,
    reverse_gradient,
)
from mmtune.training.optimizer import USUAL, Pace

_SMOOTHING = 0.1
_NOISE = 8
_INNER = 128
_BOTH, _OPPONENT, _OWN = "both", "opponent", "own"
_OPPONENT_PACE = Pace(scale=20.0, beta1=0.0, steady=True)
_PLAYER_PACE = Pace(beta1=0.0)


class GameHeads(nn.Module):
    """The discriminator, and per ordered pair of parts a generator and its judge."""

    def __init__(
        self,
        parts: Sequence[str],
        code_width: int,
        *,
        alternating: bool,
        form: str,
        noise: float = 0.0,
        sphere: bool = False,
        gradient_penalty: float = 0.0,
    ) -> None:
        """Makes random heads.

        Args:
            parts: The parts that have a code.
            code_width: C.
            alternating: The two players move in turns, step by step; else both move in every step, the gradient of
                the one reversed.
            form: Of the loss in the encoders' and generators' turn, see ``encoder_loss``.
            noise: Deviation of the Gaussian noise through which the discriminator sees codes while it trains.
            sphere: Codes are ``on_sphere``, and so those that are filled in.
            gradient_penalty: Weight of what the discriminator pays, while it trains, for steep answers.
        """
        super().__init__()
        self.parts, self.alternating, self.form = tuple(parts), alternating, form
        self.noise, self.sphere, self.gradient_penalty = noise, sphere, gradient_penalty
        self.discriminator = Discriminator(code_width, len(self.parts), _INNER)
        pairs = [f"{one}_{other}" for one, other in permutations(self.parts, 2)]
        self.generators = nn.ModuleDict({pair: CodeGenerator(code_width, _NOISE) for pair in pairs})
        self.judges = nn.ModuleDict({pair: Discriminator(2 * code_width, 2) for pair in pairs})

    def shown(self, codes_NC: torch.Tensor) -> torch.Tensor:
        """Returns ``(N, C)`` codes as the discriminator sees them: in training through noise, which is torch's."""
        return through_noise(codes_NC, self.noise) if self.training else codes_NC

    def fill(self, one: str, other: str, codes_BC: torch.Tensor) -> torch.Tensor:
        """Returns ``(B, C)`` codes of the part ``other`` made from those of ``one``; the noise is torch's."""
        noise_BZ = torch.randn(len(codes_BC), _NOISE, generator=torch.default_generator).to(codes_BC)
        made: torch.Tensor = self.generators[f"{one}_{other}"](codes_BC, noise_BZ)
        return on_sphere(made) if self.sphere else made


def through_noise(values_ND: torch.Tensor, deviation: float) -> torch.Tensor:
    """Returns ``(N, D)`` values with Gaussian noise, which is torch's; a deviation of 0 draws none."""
    if not deviation:
        return values_ND
    return values_ND + deviation * torch.randn(values_ND.shape, generator=torch.default_generator).to(values_ND)


def on_sphere(codes_NC: torch.Tensor) -> torch.Tensor:
    """Returns ``(N, C)`` codes brought to one length, the root of C, so that numbers vary by 1 as they did.

    What is contrasted by cosine says nothing by its length but how sure the encoder is: that of a medium that it
    hardly knows is short, which tells the part.
    """
    return functional.normalize(codes_NC, dim=-1) * codes_NC.shape[-1] ** 0.5


def pace_of(name: str) -> Pace:
    """Returns how a parameter of a learner, by its name there, steps in a run with the adversarial objective.

    A discriminator that learns no faster than the encoders judges codes of long ago, and one that cools down as they
    do says less and less: it takes larger steps (the two rates of Heusel et al. 2017, arXiv:1706.08500), all of one
    size. Where both sides keep a momentum of 0.9 they circle each other (Gidel et al. 2019, arXiv:1807.04740), so
    neither has any. Generators have their squared error to go by, and they and their judges step as usual.
    """
    if ".game.discriminator." in name:
        return _OPPONENT_PACE
    return _PLAYER_PACE if ".autoencoder.encoders." in name else USUAL


def game_losses(
    heads: Any, codes: Mapping[str, torch.Tensor], at: Mapping[str, torch.Tensor], step: int
) -> tuple[torch.Tensor, dict[str, float]]:
    """Returns the loss of both games, and where they stand.

    Args:
        heads: ``GameHeads``.
        codes: ``(B, C)`` by part.
        at: ``(B,)`` which rows have the part.
        step: Of the training, which says whose turn it is; -1 outside of it.
    """
    turn = _BOTH if not heads.alternating else _OWN if step % 2 and step > 0 else _OPPONENT
    loss, facts = _modality_game(heads, codes, at, turn)
    filled = []
    for one, other in permutations(codes, 2):
        both = at[one] & at[other]
        if int(both.sum()) > 1:
            own, about = _filling_game(heads, one, other, codes[one][both], codes[other][both], turn)
            filled.append(own)
            facts |= about
    return (loss + torch.stack(filled).mean() if filled else loss), facts


def _modality_game(
    heads: Any, codes: Mapping[str, torch.Tensor], at: Mapping[str, torch.Tensor], turn: str
) -> tuple[torch.Tensor, dict[str, float]]:
    own = [(heads.parts.index(name), code[at[name]]) for name, code in codes.items()]
    codes_NC = torch.cat([code for _, code in own])
    if not len(codes_NC):
        return torch.zeros((), device=codes_NC.device), {}
    part_N = torch.cat([torch.full((len(code),), index, device=codes_NC.device) for index, code in own])
    shown_NC = heads.shown(codes_NC)
    loss, _ = _play(heads.discriminator, shown_NC, part_N, turn, heads.form)
    if heads.gradient_penalty and turn != _OWN and heads.training and torch.is_grad_enabled():
        loss = loss + heads.gradient_penalty * gradient_penalty(heads.discriminator, shown_NC, part_N)
    # Where the game stands is told of the codes as they are.
    with torch.no_grad():
        logits_NK = heads.discriminator(codes_NC)
    found = game_facts(logits_NK, part_N, codes_NC.detach(), heads.parts)
    facts = {"discriminator_accuracy": found.accuracy, "game_value": found.value}
    return loss, facts | {f"code_variance_{name}": value for name, value in found.variance.items()}


def _filling_game(
    heads: Any, one: str, other: str, present_BC: torch.Tensor, true_BC: torch.Tensor, turn: str
) -> tuple[torch.Tensor, dict[str, float]]:
    """Returns the loss of filling in one part from another, and how well it goes.

    The codes themselves are no players here: what is easily filled in is not what is wanted of them.
    """
    present_BC, true_BC = present_BC.detach(), true_BC.detach()
    made_BC = heads.fill(one, other, present_BC)
    shown_NC = torch.cat([torch.cat((present_BC, codes), dim=1) for codes in (true_BC, made_BC)])
    made_N = torch.arange(2, device=shown_NC.device).repeat_interleave(len(present_BC))
    loss, logits_N2 = _play(heads.judges[f"{one}_{other}"], shown_NC, made_N, turn, heads.form)
    spread = true_BC.var(0, correction=0).sum().clamp(min=1e-6)
    error = (made_BC - true_BC).square().sum(1).mean() / spread
    found = game_facts(logits_N2, made_N, shown_NC.detach(), ("real", "made"))
    pair = f"{one}_{other}"
    facts = {
        f"fill_error_{pair}": float(error.detach()),
        f"judge_accuracy_{pair}": found.accuracy,
        f"filled_variance_{pair}": float(made_BC.detach().var(0, correction=0).mean()),
    }
    return (loss if turn == _OPPONENT else loss + error), facts


def _play(
    opponent: nn.Module, codes_NC: torch.Tensor, class_N: torch.Tensor, turn: str, form: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss of the turn, and the opponent's logits without their gradient."""
    if turn == _OWN:
        fixed = {name: parameter.detach() for name, parameter in opponent.named_parameters()}
        logits = functional_call(opponent, fixed, (codes_NC,))
        return encoder_loss(logits, class_N, form), logits.detach()
    logits = opponent(reverse_gradient(codes_NC) if turn == _BOTH else codes_NC.detach())
    return discriminator_loss(logits, class_N, smoothing=_SMOOTHING), logits.detach()
