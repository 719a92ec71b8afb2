"""Proof by the weights themselves: what trains has moved, what is frozen has not."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from mmtune.errors import IntegrityError
from mmtune.models.towers import TOWERS, fingerprints, moved_towers, tower_of
from mmtune.records import MODALITIES
from mmtune.training.ranks import sum_tensor

if TYPE_CHECKING:
    from torch import nn

# Media that a tower's weights take part in; the language model takes part in every row.
_MEDIA: dict[str, set[str]] = {
    "vision": {"image", "video"},
    "audio": {"audio"},
    "behaviour": {"behaviour"},
    "projector": set(MODALITIES),
    "fusion": set(MODALITIES),
}
_GATE = re.compile(r"(^|\.)model\.gate\.")


class TowerWatch:
    """Compares the weights before and after the first steps of a run.

    A tower moved when any of its trainable parameters did: some never get a gradient (the
    last norm of a CLIP tower), some get one only from the second step on (LoRA's A). Only a
    step that could move a tower judges it: the rate above zero, label tokens, and a medium
    that the tower sees. Until then the verdict waits, and for one more such step: behind a gate that
    starts shut (gated cross-attention), a projector gets its first gradient when the gate has opened.

    Attributes:
        waiting: Trained towers without a verdict.
    """

    def __init__(self, model: nn.Module, section: str = "finetune") -> None:
        """Takes the digests of the weights; ``section`` of the recipe is named in the advice."""
        self._section = section
        # A gate learns from rows with two modalities, which the kinds of media in a step do not tell: no verdict.
        self.waiting = {
            tower_of(name)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not _GATE.search(name)
        }
        self._before = fingerprints(model)
        self._still: set[str] = set()

    def check(
        self, model: nn.Module, *, rate: float, targets: int, modalities: Collection[str], device: str = "cpu"
    ) -> None:
        """Looks at the weights after a step.

        Args:
            model: The model.
            rate: Learning rate of the step.
            targets: Label tokens of the step.
            modalities: Kinds of media in the step, on all processes.
            device: Where the processes compare what they saw.

        Raises:
            IntegrityError: A frozen parameter moved, or a trained tower did not.
        """
        moved, still, frozen = moved_towers(self._before, model)
        moved = _anywhere(moved, device)
        still -= moved
        if frozen:
            raise IntegrityError(
                f"the frozen parameter {frozen[0]} moved in the first step", "report this as a bug", "frozen_moved"
            )
        self.waiting -= moved
        could = {tower for tower in still & self.waiting if tower not in _MEDIA or _MEDIA[tower] & set(modalities)}
        judged = could if rate > 0 and targets > 0 else set()
        twice, self._still = judged & self._still, self._still | judged
        if twice:
            raise IntegrityError(
                f"the {' and '.join(sorted(twice))} tower should train, and two steps with its media moved none of its"
                " weights",
                f"raise {self._section}.learning_rate if it is tiny, else report this as a bug with the model's name",
                "tower_still",
            )
        # The frozen ones have had their verdict; keep the digests of what is still waited for.
        trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._before = {
            name: digest for name, digest in self._before.items() if name in trains and tower_of(name) in self.waiting
        }


def _anywhere(towers: Collection[str], device: str) -> set[str]:
    """Returns the towers that any process names: each sees its own part of a weight."""
    import torch

    named = torch.tensor([float(tower in towers) for tower in TOWERS], device=device)
    counts = sum_tensor(named, "comparing weights").tolist()
    return {tower for tower, count in zip(TOWERS, counts, strict=True) if count}
