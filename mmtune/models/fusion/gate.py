"""The decision gate of late and hybrid fusion: a learned mixture of what the branches predict.

Everything is in logarithms: ``log p = logsumexp_k (log g_k + log p_k)``. A gate that is one-hot (0 and -inf)
gives back its branch to the last bit.
Shapes: K branches, V vocabulary, W width of the instruction's embedding; ``...`` rows, or rows and tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

LEAD = 0.9


class DecisionGate(nn.Module):
    """One learned weight per branch, moved by the instruction where one is given."""

    def __init__(self, branches: int, instruction_width: int | None = None, *, lead: int | None = None) -> None:
        """Makes a gate.

        Args:
            branches: K.
            instruction_width: W where the instruction conditions the gate, else None.
            lead: The branch that starts with ``LEAD`` of the weight; None starts all the same. In hybrid fusion it
                is the joint pass: what takes both modalities to learn is not learned through a third of a gradient.
        """
        super().__init__()
        self.lead = lead
        self.bias = nn.Parameter(torch.empty(branches))
        self.condition = None if instruction_width is None else nn.Linear(instruction_width, branches, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Goes back to the weights of the start, whatever the instruction."""
        nn.init.zeros_(self.bias)
        if self.lead is not None and len(self.bias) > 1:
            with torch.no_grad():
                self.bias[self.lead] = math.log(LEAD / (1 - LEAD) * (len(self.bias) - 1))
        if self.condition is not None:
            nn.init.zeros_(self.condition.weight)

    def forward(self, present: torch.Tensor, instruction: torch.Tensor | None = None) -> torch.Tensor:
        """Returns ``log g`` in fp32, ``(..., K)``: -inf at absent branches, the rest sum to 1.

        Where no branch is present all are weighed as if they were: each then reads the text alone.

        Args:
            present: Bool ``(..., K)``, whether the row has what the branch reads.
            instruction: ``(..., W)``; asked for where the gate was made with its width.
        """
        scores = self.bias.float().expand(present.shape)
        if self.condition is not None:
            if instruction is None:
                raise ValueError("this gate is conditioned by the instruction and got none")
            scores = scores + self.condition(instruction).float()
        keep = present | ~present.any(-1, keepdim=True)
        return functional.log_softmax(scores.masked_fill(~keep, -torch.inf), dim=-1)


def one_hot_gate(branch: int, present: torch.Tensor) -> torch.Tensor:
    """Returns ``log g``, ``(..., K)``, that follows one branch alone, whatever is present."""
    log_gate = torch.full(present.shape, -torch.inf, device=present.device)
    log_gate[..., branch] = 0.0
    return log_gate


def mix(log_gate: torch.Tensor, log_probs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the mixture's log-probabilities in fp32, ``(..., V)``.

    Args:
        log_gate: ``(..., K)`` of the same leading shape.
        log_probs: Per branch ``(..., V)``, normalised; a cross-entropy of the mixture takes it as logits.
    """
    terms = [gate[..., None] + part.float() for gate, part in zip(log_gate.unbind(-1), log_probs, strict=True)]
    return torch.logsumexp(torch.stack(terms), dim=0)


def gate_entropy(log_gate: torch.Tensor) -> torch.Tensor:
    """Returns the entropy in nats, ``(...)``: log K where all count the same, 0 where the gate has collapsed."""
    return torch.special.entr(log_gate.exp()).sum(-1)


def modality_dropout(present: torch.Tensor, rate: float, generator: torch.Generator) -> torch.Tensor:
    """Returns which modalities stay in training, bool ``(B, K)``: each goes with ``rate``, never a row's last one.

    Args:
        present: Bool ``(B, K)``, what each row has.
        rate: Chance to drop one, 0 to 1.
        generator: On the CPU, so every device draws the same.
    """
    draws = torch.rand(present.shape, generator=generator).to(present.device).masked_fill(~present, -1.0)
    highest = draws == draws.amax(-1, keepdim=True)
    return present & ((draws >= rate) | highest)
