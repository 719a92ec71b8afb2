"""extract.reduce at work: pooled vectors to shorter ones, fitted on the split train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmtune.errors import DivergedError
from mmtune.features.reduction import Standard, fit_pca, lost, standardized
from mmtune.recipe import Reduction
from mmtune.talk import Talk


@dataclass(frozen=True)
class Reduced:
    """Shorter vectors and what they are.

    Attributes:
        codes: ``(R, C)`` float32.
        facts: ``method``, ``width``, the widths it comes ``of``, ``rows`` that it was fitted on and not, and what share
            of the variance is ``lost``; beside an autoencoder's what PCA of the same width loses, ``lost_by_pca``.
    """

    codes: NDArray[np.float32]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Reducer:
    """Reduces vectors as a recipe asks.

    Attributes:
        settings: The recipe's extract.reduce.
        seed: Of the autoencoder.
        console: Where progress goes.
    """

    settings: Reduction
    seed: int
    console: Talk

    def wants(self, name: str) -> bool:
        """Says whether the vectors of a kind, or the joint ones, are reduced."""
        return not self.settings.of or name in self.settings.of

    def alone(self, kind: str, pooled: NDArray[np.float32], splits: Sequence[Sequence[str]]) -> Reduced:
        """Returns the codes of one kind's pooled vectors ``(R, V)``; see ``reduce``."""
        return self.reduce(kind, {kind: pooled}, np.ones((len(pooled), 1), np.bool_), splits)

    def reduce(
        self,
        name: str,
        vectors: Mapping[str, NDArray[np.float32]],
        present: NDArray[np.bool_],
        splits: Sequence[Sequence[str]],
    ) -> Reduced:
        """Returns one code per row.

        Args:
            name: What is reduced, a kind or ``joint``.
            vectors: Kind to ``(R, D)``.
            present: ``(R, K)``, what a row has.
            splits: Of every row; those of train are what is fitted on.

        Raises:
            RecipeError: The width is no reduction.
            DataError: Too few rows of train, vectors without finite numbers, or all the same.
            DivergedError: The autoencoder's numbers are not finite.
        """
        what = f"{name} rows" if name == "joint" else f"{name} features"
        train = np.array(["train" in own for own in splits], np.bool_)
        standard = standardized(vectors, present, train, what)
        directions = fit_pca(standard, self.settings.width, what)
        codes = standard.whole @ directions
        shares = lost(standard, codes @ directions.T)
        facts: dict[str, Any] = {
            "method": self.settings.method,
            "width": self.settings.width,
            "of": {kind: own.shape[1] for kind, own in vectors.items()},
            "rows": {"train": int(train.sum()), "held_out": int((~train).sum())},
            "lost": shares,
        }
        if self.settings.method == "autoencoder":
            codes, decoded = self._autoencoded(name, standard)
            facts |= {"lost": lost(standard, decoded), "lost_by_pca": shares}
        self.console.say(f"extract: {name}: {_story(facts)}")
        return Reduced(codes.astype(np.float32), facts)

    def _autoencoded(self, name: str, standard: Standard) -> tuple[NDArray[Any], NDArray[Any]]:
        import torch

        from mmtune.models.objectives.reduced import reduce_by_autoencoder

        settings = self.settings
        with self.console.progress(settings.steps, f"reduce {name}") as bar:
            codes, decoded = reduce_by_autoencoder(
                {kind: torch.from_numpy(own) for kind, own in standard.vectors.items()},
                torch.from_numpy(standard.present),
                torch.from_numpy(standard.train),
                width=settings.width,
                inner_width=settings.hidden,
                steps=settings.steps,
                seed=self.seed,
                advance=bar.advance,
            )
        if not (codes.isfinite().all() and decoded.isfinite().all()):
            raise DivergedError(
                f"extract.reduce: the autoencoder of {name} gives no finite numbers",
                "look for rows far away from all others, or use method: pca",
            )
        return codes.numpy(), decoded.numpy()


def _story(facts: Mapping[str, Any]) -> str:
    """Returns what a reduction loses, in words."""

    def shares(own: Mapping[str, Any]) -> str:
        held_out = own["held_out"]
        return f"{own['train']:.1%} on train" + ("" if held_out is None else f", {held_out:.1%} on other rows")

    told = f"{sum(facts['of'].values())} numbers reduced to {facts['width']} by {facts['method']}"
    by_pca = f" (pca {shares(facts['lost_by_pca'])})" if "lost_by_pca" in facts else ""
    return f"{told}; lost of the variance: {shares(facts['lost'])}{by_pca}"
