"""A family's own 3-D positions (mRoPE), computed without the model's weights.

Positions are made where batches are made, in loader processes, so what computes them must be
light to carry there: an instance of the model's class that holds its config and nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch


class RopeIndex:
    """The ``get_rope_index`` of a model's class.

    Args:
        owner: The module that has the method.
    """

    def __init__(self, owner: Any) -> None:
        # The method reads the config and a few plain numbers of its object, no parameter.
        self._shell = object.__new__(type(owner))
        plain = {name: value for name, value in vars(owner).items() if isinstance(value, int) and name != "training"}
        self._shell.__dict__.update(config=owner.config, **plain)
        self._takes = set(inspect.signature(type(owner).get_rope_index).parameters)

    def __call__(self, input_ids: torch.Tensor, facts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the ``(3, T)`` positions of one row.

        Args:
            input_ids: ``(T,)``.
            facts: What the family may need: ``mm_token_type_ids`` of shape ``(1, T)``,
                ``image_grid_thw`` of shape ``(N, 3)``, ``audio_seqlens`` of shape ``(M,)``.
        """
        known = {name: value for name, value in facts.items() if name in self._takes}
        mask = torch.ones_like(input_ids)[None]
        positions, _ = self._shell.get_rope_index(input_ids[None], attention_mask=mask, **known)
        return positions[:, 0]


def rope_index(model: Any) -> RopeIndex | None:
    """Returns the positions of a family with mRoPE, None for a family with plain positions."""
    owner = next((module for module in model.modules() if hasattr(type(module), "get_rope_index")), None)
    return None if owner is None else RopeIndex(owner)
