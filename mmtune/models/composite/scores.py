"""What each modality alone would have answered, and how much the gate trusted it: for reports.

Shapes: B rows, T tokens, K branches, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mmtune.models.composite.config import CompositeConfig
from mmtune.models.composite.head import MixingHead
from mmtune.models.encoder_outputs import base_of
from mmtune.models.fusion.gate import gate_entropy, one_hot_gate


@dataclass(frozen=True)
class BranchScores:
    """Per row of a batch.

    Attributes:
        branches: Names: ``joint`` and modalities.
        nll: ``(B, K)`` summed negative log-likelihood of the answer by each branch alone.
        gate: ``(B, K)`` mean weight of each branch over the answer's tokens.
        entropy: ``(B,)`` mean entropy of the gate in nats; 0 where it has collapsed on one branch.
    """

    branches: tuple[str, ...]
    nll: torch.Tensor
    gate: torch.Tensor
    entropy: torch.Tensor


@torch.no_grad()
def branch_scores(model: Any, batch: Mapping[str, torch.Tensor]) -> BranchScores:
    """Returns the scores of every branch on the answers of a batch.

    Args:
        model: A composite model of late or hybrid fusion, in evaluation mode.
        batch: As for its forward pass, with ``labels``.

    Raises:
        ValueError: The model has no branches to tell apart.
    """
    config = model.config
    if not isinstance(model.lm_head, MixingHead) or len(config.branches) < 2:
        raise ValueError(f"fusion.mode {config.fusion['mode']} has one branch")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    made = model.model(**inputs, use_cache=False)
    targets_BT = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    bears_BT = targets_BT != -100
    rows_N = bears_BT.nonzero(as_tuple=True)[0]
    hidden = made.last_hidden_state[bears_BT]
    if hidden.shape[-1] == model.lm_head.in_features:
        parts = [model.lm_head(hidden).float().log_softmax(-1)]
    else:
        parts = model.lm_head.parts(hidden)[1]
    found = [-part.gather(1, targets_BT[bears_BT][:, None])[:, 0] for part in parts]
    nll_NK = torch.stack([found[number] for number in made.passes.of_branch], dim=1)
    log_gate_NK = made.log_gate[bears_BT]
    counts_B1 = bears_BT.sum(1).clamp(min=1)[:, None]

    def by_row(values: torch.Tensor) -> torch.Tensor:
        zeros = values.new_zeros(len(targets_BT), values.shape[1])
        return zeros.index_add(0, rows_N, values)

    entropy_B1 = by_row(gate_entropy(log_gate_NK)[:, None]) / counts_B1
    return BranchScores(config.branches, by_row(nll_NK), by_row(log_gate_NK.exp()) / counts_B1, entropy_B1[:, 0])


def branches_of(model: Any) -> tuple[str, ...]:
    """Returns what the gate of a model mixes; nothing for one that has no gate, or stands behind a soft prompt.

    Args:
        model: Any transformers or PEFT model.
    """
    adapters = getattr(model, "peft_config", {}).values()
    # A branch is run on the base, which does not see virtual tokens.
    behind = any(adapter.is_prompt_learning for adapter in adapters)
    return () if behind else branches_of_config(base_of(model).config)


def branches_of_config(config: Any) -> tuple[str, ...]:
    """Returns what the gate of a base of this config mixes; nothing where it has no gate."""
    return config.branches if isinstance(config, CompositeConfig) and len(config.branches) > 1 else ()


def has_auxiliary_loss(model: Any) -> bool:
    """Says whether the branches of a model also train by what they answer alone, see ``auxiliary``."""
    return auxiliary_share(model) > 0


def auxiliary_share(model: Any) -> float:
    """Returns the share of the training loss that is what the branches of a model lose alone, in [0, 1]."""
    config = base_of(model).config
    return float(config.fusion["auxiliary_loss"]) if isinstance(config, CompositeConfig) else 0.0


def sees_by_mask(model: Any) -> bool:
    """Says whether a model takes media that the attention mask hides for missing, as it does in training."""
    return isinstance(base_of(model).config, CompositeConfig)


@contextmanager
def only_branch(model: Any, branch: str) -> Iterator[None]:
    """Lets one branch answer alone, whatever the gate has learned, until the context ends.

    Args:
        model: A composite model of late or hybrid fusion, or its PEFT model.
        branch: One of its branches.
    """
    base = base_of(model)
    place = base.config.branches.index(branch)
    hook = base.model.gate.register_forward_hook(lambda gate, args, made: one_hot_gate(place, args[0]))
    try:
        yield
    finally:
        hook.remove()
