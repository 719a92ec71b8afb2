"""The summed cross-entropy of a batch, with logits only where there is a label.

Shapes: B rows, T tokens, N tokens that bear loss, H model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from mmtune.models.composite.auxiliary import OwnAnswers, blended, weighed
from mmtune.models.encoder_outputs import encoder_outputs_in
from mmtune.models.head_apart import head_to_run_apart, left_out
from mmtune.models.label_tokens import only_label_tokens, unwrapped
from mmtune.models.mask_rules import MaskRules
from mmtune.models.soft_prompt import is_prefix, run_behind_virtual_tokens, virtual_tokens
from mmtune.training.cross_entropy import cross_entropy, in_parts
from mmtune.training.ledger import Said
from mmtune.training.tree_mask import attention_mask, behind_virtual_tokens

IGNORED = -100
# What a batch holds for the loss and not for the model.
_OURS = ("labels", "next_labels", "layout", "spans", "tiles", "tasks")


def answer_loss(
    model: Any, batch: Mapping[str, torch.Tensor], rules: MaskRules | None = None
) -> tuple[torch.Tensor, int]:
    """Returns the summed cross-entropy in fp32 over the label tokens, and their number; arguments as below.

    A model with auxiliary losses (``fusion.auxiliary_loss``) loses by them while it trains.
    """
    found = _run(model, batch, rules)
    if found.own_answers is None or not model.training:
        return found.cross_entropy("sum"), found.targets_N.numel()
    losses_N, _ = _losses(model, found)
    return losses_N.sum(), found.targets_N.numel()


def answer_losses(
    model: Any, batch: Mapping[str, torch.Tensor], rules: MaskRules | None = None
) -> tuple[torch.Tensor, torch.Tensor, Said]:
    """Returns the loss in fp32 of every label token, ``(N,)``, the number of its conversation, and its parts to log.

    Conversations are the rows, or the branches of packed trees in their order. Parts are those of auxiliary losses:
    what the mixture loses and what each pass loses alone, of those that the gate weighs. Arguments as below.
    """
    found = _run(model, batch, rules)
    losses_N, said = _losses(model, found)
    if "layout" not in batch:
        return losses_N, found.bears_BT.nonzero()[:, 0], said
    tree_BT, branch_BT = batch["layout"][0].long(), batch["layout"][1].long()
    inside_BT = branch_BT > 0
    row_BT = torch.arange(len(tree_BT), device=tree_BT.device)[:, None].expand_as(tree_BT)
    keys = torch.stack((row_BT, tree_BT, branch_BT), dim=-1)[inside_BT]
    owner_BT = torch.zeros_like(tree_BT)
    owner_BT[inside_BT] = torch.unique_consecutive(keys, dim=0, return_inverse=True)[1]
    return losses_N, owner_BT[found.bears_BT], said


@dataclass(frozen=True)
class _Found:
    """What a model made of a batch.

    Attributes:
        made: Its output, with ``(1, N, V)`` logits; what its head takes, ``(1, N, H)``, where the head runs apart.
        head: That runs apart, or None.
        targets_N: The labels.
        bears_BT: Whether the token that this one predicts bears loss.
    """

    made: Any
    head: torch.nn.Module | None
    targets_N: torch.Tensor
    bears_BT: torch.Tensor

    @property
    def own_answers(self) -> OwnAnswers | None:
        return getattr(self.made, "own_answers", None)

    def cross_entropy(self, reduction: str) -> torch.Tensor:
        """Returns the sum in fp32, or each by ``none``."""
        return cross_entropy(self.made.logits[0], self.targets_N, reduction, self.head)


def _losses(model: Any, found: _Found) -> tuple[torch.Tensor, Said]:
    """Returns ``(N,)`` what the label tokens lose, in training with the auxiliary losses, and its parts to log."""
    mixture_N, own, targets_N = found.cross_entropy("none"), found.own_answers, found.targets_N
    if own is None:
        return mixture_N, []
    own_NK, weighed_NK = own.losses(mixture_N, targets_N), weighed(found.made.log_gate, found.bears_BT)
    losses_N = blended(mixture_N, own_NK, weighed_NK, own.share) if model.training else mixture_N
    counts = [targets_N.numel(), *weighed_NK.sum(0).tolist()]
    sums = [float(mixture_N.detach().sum()), *own_NK.detach().where(weighed_NK, 0.0).sum(0).tolist()]
    names = ["loss_mixture", *(f"loss_alone_{branch}" for branch in own.branches)]
    parts = zip(names, sums, counts, strict=True)
    return losses_N, [({name: total / count}, count) for name, total, count in parts if count]


def _run(model: Any, batch: Mapping[str, torch.Tensor], rules: MaskRules | None) -> _Found:
    """Returns what the model makes of a batch where there is a label.

    Args:
        model: Called with the batch less its labels and its layout, features in the place of media.
        batch: Padded rows with ``labels`` ``(B, T)``, -100 where there is no loss; or packed trees as
            ``TreeCollator`` makes them, with ``next_labels``.
        rules: The model's attention; wanted for packed trees.
    """
    given = {name: value for name, value in batch.items() if name not in _OURS}
    next_BT = batch["next_labels"] if "next_labels" in batch else next_labels(batch["labels"])
    bears_BT = next_BT != IGNORED
    targets_N = next_BT[bears_BT]
    vocabulary = unwrapped(model).config.get_text_config().vocab_size
    head = head_to_run_apart(model) if in_parts(targets_N.numel(), vocabulary) else None
    with encoder_outputs_in(model, given) as inputs, only_label_tokens(model, bears_BT), left_out(head):
        if "layout" not in batch:
            made = model(**inputs, use_cache=False)
        else:
            assert rules is not None
            made = _run_packed(model, inputs, batch, rules)
    return _Found(made, head, targets_N, bears_BT)


def next_labels(labels_BT: torch.Tensor) -> torch.Tensor:
    """Returns ``(B, T)`` the label of the token after each, which is what it predicts; the last predicts none."""
    return functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


def _run_packed(model: Any, inputs: Mapping[str, Any], batch: Mapping[str, torch.Tensor], rules: MaskRules) -> Any:
    count = virtual_tokens(model)
    if not count:
        return model(**{**inputs, "attention_mask": attention_mask(batch, rules)}, use_cache=False)
    whole = {"layout": behind_virtual_tokens(batch["layout"], count)}
    mask = attention_mask(whole, rules, first=count if is_prefix(model) else 0)
    return run_behind_virtual_tokens(model, {**inputs, "attention_mask": mask})
