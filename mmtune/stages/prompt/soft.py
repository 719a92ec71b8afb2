"""Soft tokens of method bbt: a frozen model with vectors before every row, and the adapter that keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mmtune.models.adapter import save_tuned
from mmtune.models.soft_prompt import add_soft_prompt, set_virtual_tokens, word_vectors
from mmtune.prompts.search.bbt import BbtSettings, SoftPrompt, Subspace, random_subspace
from mmtune.prompts.searched import SearchedPrompt
from mmtune.recipe import Bbt
from mmtune.records import Example
from mmtune.stages.prompt.asking import Answered, Asker


def bbt_settings(own: Bbt) -> BbtSettings:
    """Returns how the subspace is searched."""
    return BbtSettings(own.dimension, own.sigma)


@dataclass
class SoftAsker:
    """Asks a model with and without soft tokens before its rows.

    Attributes:
        plain: Asks without.
        behind: Asks behind the tokens.
        subspace: Where they come from.
    """

    plain: Asker
    behind: Asker
    subspace: Subspace

    @property
    def calls(self) -> int:
        """Pairs of prompt and row that were asked."""
        return self.plain.calls + self.behind.calls

    def answered(self, prompt: SearchedPrompt, examples: Sequence[Example], reward: str) -> Answered:
        """Returns rewards of rows asked with a prompt, see ``Asker.answered``."""
        if not prompt.soft:
            return self.plain.answered(prompt, examples, reward)
        self._put(prompt.soft)
        return self.behind.answered(prompt, examples, reward)

    def save(self, z: Sequence[float], folder: Path) -> None:
        """Writes soft tokens as an adapter of method prompt."""
        self._put(z)
        save_tuned(self.behind.model, folder)

    def _put(self, z: Sequence[float]) -> None:
        set_virtual_tokens(self.behind.model, torch.from_numpy(self.subspace.vectors(SoftPrompt(tuple(z)))))


def soften(asker: Asker, own: Bbt, seed: int, base_path: str) -> SoftAsker:
    """Returns an asker whose model can take soft tokens; p0 is the embeddings of tokens drawn from the vocabulary.

    Args:
        asker: Of the frozen base.
        own: ``prompt.bbt``.
        seed: Of the draw and of the subspace.
        base_path: Recorded in the adapter.

    Raises:
        CapabilityError: The family gives tokens positions or blocks that soft tokens would shift.
    """
    words_WH = word_vectors(asker.model)
    drawn = torch.randint(len(words_WH), (own.soft_tokens,), generator=torch.Generator().manual_seed(seed))
    start_VH = words_WH[drawn].double().numpy()
    spread = float(words_WH.std())
    subspace = random_subspace(start_VH, spread, settings=bbt_settings(own), alpha=own.alpha, seed=seed)
    device = next(asker.model.parameters()).device
    model = add_soft_prompt(asker.model, "prompt", virtual_tokens=own.soft_tokens, base_path=base_path).to(device)
    return SoftAsker(asker, replace(asker, model=model.eval()), subspace)
