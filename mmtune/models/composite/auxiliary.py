"""Auxiliary losses of late and hybrid fusion: every branch also trains by the answer that it would give alone.

Of a mixture ``p = sum_k g_k p_k`` the branch that already gives the answer a high probability gets nearly all of the
gradient, ``g_k p_k / p``, and a weaker one stays weak (arXiv:1905.12681). So a share ``a`` of what a label token loses
is the mean of what the branches lose alone there, of those that the gate weighs:

    loss = -(1 - a) log p - a / K sum_k log p_k

What a token loses stays a cross-entropy, whatever is shown: where one branch is all, alone or mixed is the same.

Shapes: B rows, T tokens, N label tokens, P passes, K branches, V vocabulary; ``...`` rows and tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class OwnAnswers:
    """What each branch predicts alone.

    Attributes:
        branches: Their names, K.
        share: ``a``, of the training loss.
        of_branch: Per branch, its pass.
        log_probs: Per pass ``(..., V)`` in fp32, beside the mixture; None where one pass is all.
    """

    branches: tuple[str, ...]
    share: float
    of_branch: tuple[int, ...]
    log_probs: Sequence[torch.Tensor] | None

    def losses(self, mixture_N: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """Returns ``(N, K)`` what the branches lose alone.

        Args:
            mixture_N: What the mixture loses.
            targets_N: Ids of the label tokens.
        """
        if self.log_probs is None:
            return mixture_N[:, None].expand(-1, len(self.branches))
        at_N1 = targets_N[:, None]
        found = [-own.flatten(0, -2).gather(1, at_N1)[:, 0] for own in self.log_probs]
        return torch.stack([found[number] for number in self.of_branch], dim=1)


def predict(head: nn.Module, hidden: torch.Tensor, made: Any, config: Any) -> None:
    """Puts the logits into a model's output, and what the branches predict alone where the config asks for it.

    Args:
        head: The output head.
        hidden: What it takes.
        made: The ``CompositeOutput``.
        config: The ``CompositeConfig``.
    """
    share = config.fusion["auxiliary_loss"]
    if not share or made.log_gate is None:
        made.logits = head(hidden)
        return
    made.logits, apart = head(hidden, apart=True)
    made.own_answers = OwnAnswers(config.branches, share, made.passes.of_branch, apart)


def weighed(log_gate_BTK: torch.Tensor, bears_BT: torch.Tensor) -> torch.Tensor:
    """Returns bool ``(N, K)``: the branches that the gate weighs at the label tokens.

    Args:
        log_gate_BTK: Of the model's output; virtual tokens may stand before the others.
        bears_BT: Whether the token that this one predicts bears loss.
    """
    return log_gate_BTK[:, -bears_BT.shape[1] :][bears_BT] > -torch.inf


def blended(mixture_N: torch.Tensor, own_NK: torch.Tensor, weighed_NK: torch.Tensor, share: float) -> torch.Tensor:
    """Returns ``(N,)`` what the label tokens lose while training.

    Args:
        mixture_N: What the mixture loses.
        own_NK: What the branches lose alone.
        weighed_NK: Whose loss counts; of every token at least one's.
        share: ``a``.
    """
    mean_N = own_NK.where(weighed_NK, 0.0).sum(1) / weighed_NK.sum(1)
    return (1 - share) * mixture_N + share * mean_N


def loss_of_labels(
    made: Any, labels_BT: torch.Tensor, usual: Callable[..., torch.Tensor], *, training: bool, **kwargs: Any
) -> torch.Tensor:
    """Returns the mean loss of a model's output: of the mixture, and in training with the auxiliary losses.

    Args:
        made: The ``CompositeOutput``, with logits of all tokens.
        labels_BT: -100 where there is no loss.
        usual: transformers' loss, which takes ``logits``, ``labels`` and ``kwargs``.
        training: Whether the model trains.
        kwargs: Of the call; ``num_items_in_batch`` divides the sum in place of the number of label tokens.
    """
    own: OwnAnswers | None = made.own_answers
    if own is None or not training:
        return usual(logits=made.logits, labels=labels_BT, **kwargs)
    next_BT = functional.pad(labels_BT[:, 1:], (0, 1), value=-100)
    bears_BT = next_BT != -100
    targets_N = next_BT[bears_BT]
    mixture_N = functional.cross_entropy(made.logits[bears_BT].float(), targets_N, reduction="none")
    parts = None if own.log_probs is None else [part[bears_BT] for part in own.log_probs]
    at_labels = OwnAnswers(own.branches, own.share, own.of_branch, parts)
    counts_NK = weighed(made.log_gate, bears_BT)
    losses_N = blended(mixture_N, at_labels.losses(mixture_N, targets_N), counts_NK, own.share)
    items = kwargs.get("num_items_in_batch")
    return losses_N.sum() / (losses_N.numel() if items is None else items)
