"""The minimax game over modalities: a discriminator names a code's modality, encoders hide it.

Over M modalities with equal weight the value is ``V = sum_m E_m[log D_m(code)]``. The best discriminator reaches
``M JSD - M log M`` (Goodfellow et al. 2014; for two: ``2 JSD - log 4``), and codes alike for all modalities give
``-M log M``.
Shapes: B rows, M modalities, C width of a code, Z width of the noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Discriminator(nn.Module):
    """Names the modality of a pooled code: an MLP of one hidden layer."""

    def __init__(self, code_width: int, modalities: int, inner_width: int = 64) -> None:
        super().__init__()
        self.inner = nn.Linear(code_width, inner_width)
        self.outer = nn.Linear(inner_width, modalities)

    def forward(self, codes_BC: torch.Tensor) -> torch.Tensor:
        """Returns logits, ``(B, M)``."""
        return self.outer(functional.gelu(self.inner(codes_BC)))


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: float) -> torch.Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.mul(-ctx.weight), None


def reverse_gradient(x: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    """Returns ``x`` itself, whose gradient comes back times ``-weight`` (Ganin and Lempitsky 2015)."""
    return _Reverse.apply(x, weight)


def discriminator_loss(logits_BM: torch.Tensor, modality_B: torch.Tensor, *, smoothing: float = 0.0) -> torch.Tensor:
    """Returns ``-V / M``: the cross-entropy of the true modality, each modality with the same weight.

    Called on ``reverse_gradient(codes)`` it trains both players in one backward pass; called on detached codes it
    is the discriminator's turn.

    Args:
        logits_BM: Of the discriminator.
        modality_B: Index of the true modality.
        smoothing: Share of the target spread over all modalities; keeps the discriminator from being too sure.
    """
    loss_B = functional.cross_entropy(logits_BM.float(), modality_B, reduction="none", label_smoothing=smoothing)
    return _balanced(loss_B, modality_B, logits_BM.shape[-1])


def encoder_loss(logits_BM: torch.Tensor, modality_B: torch.Tensor, form: str = "non_saturating") -> torch.Tensor:
    """Returns the encoders' loss in their turn, each modality with the same weight.

    Args:
        logits_BM: Of the discriminator, on codes with their gradient.
        modality_B: Index of the true modality.
        form: ``minimax`` is ``V / M`` itself, flat once the discriminator wins; ``non_saturating`` is
            ``-E[log(1 - D_true)]``, steep there.

    Raises:
        ValueError: No such form.
    """
    log_probs = functional.log_softmax(logits_BM.float(), dim=-1)
    if form == "minimax":
        loss_B = log_probs.gather(1, modality_B[:, None])[:, 0]
    elif form == "non_saturating":
        others = functional.one_hot(modality_B, logits_BM.shape[-1]).bool()
        loss_B = -torch.logsumexp(log_probs.masked_fill(others, -torch.inf), dim=-1)
    else:
        raise ValueError(f"the form of the encoders' loss is minimax or non_saturating, not {form!r}")
    return _balanced(loss_B, modality_B, logits_BM.shape[-1])


def _balanced(loss_B: torch.Tensor, modality_B: torch.Tensor, modalities: int) -> torch.Tensor:
    """Mean over the modalities that occur of the mean over their rows."""
    sums = loss_B.new_zeros(modalities).index_add(0, modality_B, loss_B)
    rows = torch.bincount(modality_B, minlength=modalities)
    return (sums / rows.clamp(min=1)).sum() / (rows > 0).sum()


def gradient_penalty(discriminator: nn.Module, codes_BC: torch.Tensor, modality_B: torch.Tensor) -> torch.Tensor:
    """Returns half the mean square of how steeply the log odds of the true modality change with a code.

    Each modality has the same weight. A discriminator that pays for it answers alike for codes that lie close, stops
    circling the encoders, and the game converges (R1, Mescheder et al. 2018, arXiv:1801.04406). It is the
    discriminator's own: codes get no gradient of it.

    Args:
        discriminator: It is differentiated twice.
        codes_BC: As it sees them.
        modality_B: Index of the true modality.
    """
    codes_BC = codes_BC.detach().requires_grad_()
    logits_BM = discriminator(codes_BC).float()
    true_BM = functional.one_hot(modality_B, logits_BM.shape[-1]).bool()
    odds_B = logits_BM[true_BM] - torch.logsumexp(logits_BM.masked_fill(true_BM, -torch.inf), dim=-1)
    (slope_BC,) = torch.autograd.grad(odds_B.sum(), codes_BC, create_graph=True)
    return 0.5 * _balanced(slope_BC.float().square().sum(1), modality_B, logits_BM.shape[-1])


class CodeGenerator(nn.Module):
    """Fills in the code of a missing modality from that of a present one, with noise for what it cannot tell."""

    def __init__(self, code_width: int, noise_width: int, inner_width: int = 64) -> None:
        super().__init__()
        self.noise_width = noise_width
        self.inner = nn.Linear(code_width + noise_width, inner_width)
        self.outer = nn.Linear(inner_width, code_width)

    def forward(self, present_BC: torch.Tensor, noise_BZ: torch.Tensor) -> torch.Tensor:
        """Returns codes of the missing modality, ``(B, C)``."""
        return self.outer(functional.gelu(self.inner(torch.cat((present_BC, noise_BZ), dim=-1))))


@dataclass(frozen=True)
class GameFacts:
    """Where the game stands.

    Attributes:
        accuracy: Share of codes whose modality the discriminator names, each modality with the same weight.
        value: V in nats; ``-M log M`` when codes are alike.
        variance: Mean variance over the code's dimensions, by modality.
    """

    accuracy: float
    value: float
    variance: Mapping[str, float]


@torch.no_grad()
def game_facts(
    logits_BM: torch.Tensor, modality_B: torch.Tensor, codes_BC: torch.Tensor, names: tuple[str, ...]
) -> GameFacts:
    """Returns accuracy, value and variances over a batch.

    Args:
        logits_BM: Of the discriminator on these codes.
        modality_B: Index of the true modality into ``names``.
        codes_BC: Real or generated codes.
        names: Of the modalities.
    """
    right_B = (logits_BM.argmax(-1) == modality_B).float()
    value = -len(names) * discriminator_loss(logits_BM, modality_B)
    variance = {
        name: float(codes_BC[modality_B == index].float().var(0, correction=0).mean())
        for index, name in enumerate(names)
        if bool((modality_B == index).any())
    }
    return GameFacts(float(_balanced(right_B, modality_B, len(names))), float(value), variance)


def game_warnings(facts: GameFacts, *, floor: float = 1e-4) -> list[str]:
    """Returns a sentence per sign of a game gone wrong, none where it goes well.

    Args:
        facts: Late in a run.
        floor: Variance under which codes count as collapsed.
    """
    found = []
    if not math.isfinite(facts.value):
        found.append("the value of the game is not finite: lower the learning rate or the adversarial weight")
    if facts.accuracy > 0.98:
        found.append(
            f"the discriminator names {facts.accuracy:.1%} of the modalities: encoders get next to no gradient from "
            "minimax; use non_saturating, label smoothing, or fewer discriminator steps"
        )
    for name, variance in facts.variance.items():
        if variance < floor:
            found.append(f"codes of {name} have collapsed (variance {variance:.1e}): lower the adversarial weight")
    return found
