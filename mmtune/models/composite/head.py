"""The head of late and hybrid fusion: what the passes predict, mixed by the gate.

Shapes: P passes, H width, V vocabulary; ``...`` rows and tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mmtune.models.fusion.gate import mix

_ABSENT = -1e9


class MixingHead(nn.Linear):
    """A language model's head over several passes; over one pass it is the plain head.

    It takes one tensor, so whatever keeps the hidden states of some tokens only works on it as on any head.
    """

    def forward(self, input: torch.Tensor, apart: bool = False) -> Any:
        """Returns ``(..., V)``: logits of one pass, or log-probabilities of the mixture in fp32.

        Args:
            input: ``(..., H)``, or ``join`` of several passes.
            apart: Return what each pass predicts beside the mixture, as ``parts`` does; None where one pass is all.
        """
        if input.shape[-1] == self.in_features:
            made = super().forward(input)
            return (made, None) if apart else made
        log_gate, parts = self.parts(input)
        mixture = mix(log_gate, parts)
        return (mixture, parts) if apart else mixture

    def parts(self, joined: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns ``log g`` ``(..., P)`` and per pass the log-probabilities ``(..., V)``, both in fp32."""
        passes = joined.shape[-1] // (self.in_features + 1)
        *hidden, log_gate = joined.split([self.in_features] * passes + [passes], dim=-1)
        logits = (super(MixingHead, self).forward(own.to(self.weight.dtype)) for own in hidden)
        return log_gate.float(), [own.float().log_softmax(-1) for own in logits]


def join(hidden: torch.Tensor, log_gate: torch.Tensor) -> torch.Tensor:
    """Returns ``(B, T, P * H + P)``, what ``MixingHead`` takes.

    Args:
        hidden: ``(B * P, T, H)``, the passes of a row next to each other.
        log_gate: ``(B, T, P)`` in fp32.
    """
    passes = log_gate.shape[-1]
    hidden_BTX = hidden.unflatten(0, (-1, passes)).transpose(1, 2).flatten(2)
    return torch.cat((hidden_BTX, log_gate), dim=-1)


def gate_of_passes(log_gate: torch.Tensor, of_branch: tuple[int, ...], passes: int) -> torch.Tensor:
    """Returns ``(B, T, P)`` log weights of passes, each the sum of its branches' weights.

    Args:
        log_gate: ``(B, T, K)`` of the branches.
        of_branch: Per branch, its pass.
        passes: P.
    """
    # The gradient of a sum in which nothing is present would be NaN at minus infinity.
    log_gate = log_gate.clamp(min=_ABSENT)
    own = [[k for k, number in enumerate(of_branch) if number == one] for one in range(passes)]
    return torch.stack([log_gate[..., branches].logsumexp(-1) for branches in own], dim=-1)
