"""build.mixture at work: one pass over the sources for what they have, and what each then gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mmtune.errors import DataError, RecipeError
from mmtune.prompts.exemplars import ExemplarPool
from mmtune.prompts.mixture import (
    Found,
    Quota,
    check_held_out,
    mixed,
    quotas,
    source_clusters,
    survey,
    task_rates,
)
from mmtune.recipe import Source
from mmtune.recipe.mixture import Mixture
from mmtune.records import Record, Reject

Items = Iterator[Record | Reject]


@dataclass(frozen=True)
class Mixed:
    """What a mixture takes.

    Attributes:
        quotas: Training source to what it gives; a held-out one has none.
        held_out: Held-out cluster to its sources.
        pools: Training source to its rows that may become exemplars; empty when none are asked for.
    """

    quotas: Mapping[str, Quota]
    held_out: Mapping[str, tuple[str, ...]]
    pools: Mapping[str, tuple[Record, ...]]

    def take(self, source: Source, items: Items) -> Items:
        """Yields what a source gives: all of it for val and test, its quota for train."""
        if source.split != "train":
            return items
        return mixed(items, self.quotas[source.id]) if source.id in self.quotas else iter(())

    def facts(self, rows: Mapping[str, int], asked: Counter[str]) -> dict[str, Any]:
        """Returns what the manifest says of the mixture.

        Args:
            rows: Training source to the rows that were built.
            asked: Training rows by how they are asked.
        """
        total = sum(rows.values())
        built = [
            {**quota.facts(), "built": rows[source], "share": rows[source] / total if total else 0.0}
            for source, quota in self.quotas.items()
        ]
        shots = {name.removeprefix("shots_"): count for name, count in asked.items() if name.startswith("shots_")}
        parted = {name.removeprefix("parted_"): count for name, count in asked.items() if name.startswith("parted_")}
        return {
            "sources": built,
            "held_out": {cluster: list(sources) for cluster, sources in self.held_out.items()},
            "rows": total,
            "shots": dict(sorted(shots.items(), key=lambda item: int(item[0]))),
            "delimiters": dict(sorted(parted.items())),
            **{name: asked[name] for name in ("rationale", "options", "no_options", "inverted")},
        }


def plan_mixture(
    mixture: Mixture, sources: tuple[Source, ...], read: Callable[[int], Items], seed: int, pool_rows: int
) -> Mixed:
    """Returns what a mixture takes, after one pass over every training source that is not held out.

    Args:
        mixture: The recipe's section.
        sources: All sources of the recipe.
        read: Number of a source to its items, from the start.
        seed: Of the exemplars.
        pool_rows: Most rows of a source that may become exemplars.

    Raises:
        RecipeError: It names what is not there, or holds everything out.
        DataError: Rationales are asked for and no row has one, or nothing is left to mix.
    """
    clusters = source_clusters(tuple(dict.fromkeys(source.id for source in sources)), mixture.clusters)
    check_held_out(mixture.hold_out, clusters)
    out = {name: tuple(one for one, own in clusters.items() if own == name) for name in mixture.hold_out}
    train = {
        source.id: at
        for at, source in enumerate(sources)
        if source.split == "train" and clusters[source.id] not in mixture.hold_out
    }
    _check_replay(mixture, train)
    found: dict[str, Found] = {}
    pools: dict[str, tuple[Record, ...]] = {}
    for name, at in train.items():
        pool = ExemplarPool(seed, pool_rows)
        found[name] = survey(read(at), pool.see if pool_rows else None)
        if pool_rows:
            pools[name] = pool.rows()
    if mixture.chain_of_thought and not any(one.rationales for one in found.values()):
        raise DataError(
            "build.mixture.chain_of_thought asks for rationales and no training row has one",
            "name their column (columns: {rationale: ...}), or leave chain_of_thought out",
            "no_rationale",
        )
    return Mixed(_quotas(mixture, found, clusters), out, pools)


def _check_replay(mixture: Mixture, train: Mapping[str, int]) -> None:
    for name in mixture.replay:
        if name not in train:
            raise RecipeError(
                f"build.mixture.replay names {name!r}, which gives no training row",
                f"training sources that are not held out: {', '.join(train) or 'none'}",
                "unknown_source",
            )


def _quotas(mixture: Mixture, found: Mapping[str, Found], clusters: Mapping[str, str]) -> dict[str, Quota]:
    counts = {name: one.rows for name, one in found.items()}
    empty = [name for name in mixture.replay if not counts[name]]
    fresh = sum(min(count, mixture.cap or count) for name, count in counts.items() if name not in mixture.replay)
    if empty or not fresh:
        raise DataError(
            f"the mixture has nothing to take from: {', '.join(empty) or 'no training row is left'}",
            "add training sources, or hold fewer clusters out",
            "no_rows",
        )
    rates = task_rates(
        counts, rate=mixture.rate, cap=mixture.cap, temperature=mixture.temperature, replay=mixture.replay
    )
    rows = mixture.rows or round(fresh / (1 - sum(mixture.replay.values())))
    return quotas(found, clusters, rates, rows)
