"""Mixtures of tasks as FLAN makes them: how many rows of each, and which.

Rates are those of Wei et al. 2022 (arXiv:2109.01652) and Raffel et al. 2020 (arXiv:1910.10683,
section 3.5.2): a task of n rows gets ``min(n, cap) ** (1 / T)`` parts. T is 1 for
examples-proportional mixing and 2 for the square root. Numbers of rows are whole and sum to what
was asked for; the rows of a task are those whose ids hash lowest, so that a smaller mixture is a
subset of a larger one.
"""

from __future__ import annotations

import difflib
import random
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from mmtune.choice import id_hash
from mmtune.errors import RecipeError
from mmtune.prompts.template import Style
from mmtune.records import Record, Reject

Rate = Literal["proportional", "square_root", "temperature"]


@dataclass(frozen=True, slots=True)
class Shares:
    """The parts of the training rows that are asked in a certain way.

    Attributes:
        shots: Number of exemplars to the share of rows that get so many; the rest gets none.
        rationale: Share with its reasoning before the answer.
        options: Share of the rows with options whose options are listed; None leaves it to the templates.
        inverted: Share that is asked the other way round.
        delimiters: Share of the rows with exemplars that show them as text.
    """

    shots: Mapping[int, float] = field(default_factory=dict)
    rationale: float = 0.0
    options: float | None = None
    inverted: float = 0.0
    delimiters: float = 0.0

    def draw(self, row: str, seed: int) -> tuple[Style, int]:
        """Returns the style of a row and its number of exemplars, drawn from seed and id alone."""
        dice = random.Random(f"{seed}\0{row}")
        shot, thought, listed, turned = (dice.random() for _ in range(4))
        inverted = turned < self.inverted
        style = Style(
            options=None if self.options is None else listed < self.options,
            inverted=inverted,
            rationale=thought < self.rationale and not inverted,
        )
        for count, share in sorted(self.shots.items()):
            if shot < share:
                return style, count
            shot -= share
        return style, 0


@dataclass(frozen=True)
class Found:
    """What one pass over a source's training rows found.

    Attributes:
        hashes: ``(rows,)`` 64-bit hashes of their ids.
        rationales: How many say how their answer is reached.
    """

    hashes: np.ndarray
    rationales: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.hashes)


@dataclass(frozen=True, slots=True)
class Quota:
    """What a source gives to the mixture.

    Attributes:
        found: Rows that it has.
        rate: Its part of the mixture before rounding.
        rows: Rows that it gives; more than ``found`` means that rows are repeated in other wordings.
        bound: Rows whose id hashes are not above it are taken once more than ``rows // found``.
    """

    source: str
    cluster: str
    found: int
    rate: float
    rows: int
    bound: int

    def facts(self) -> dict[str, Any]:
        """Returns what the manifest says of it."""
        repeated = max(self.rows - self.found, 0)
        kept = {"source": self.source, "cluster": self.cluster, "found": self.found, "rate": self.rate}
        return {**kept, "rows": self.rows, "repeated": repeated}


def survey(items: Iterable[Record | Reject], see: Any = None) -> Found:
    """Returns what the records among some items are, in eight bytes a row.

    Args:
        items: Read once.
        see: Called with every record.
    """
    hashes, rationales = array("Q"), 0
    for item in items:
        if isinstance(item, Record):
            hashes.append(id_hash(item.id, "source"))
            rationales += bool(item.rationale)
            if see is not None:
                see(item)
    return Found(np.array(hashes, np.uint64), rationales)


def task_rates(
    counts: Mapping[str, int], *, rate: Rate, cap: int | None, temperature: float, replay: Mapping[str, float]
) -> dict[str, Fraction | float]:
    """Returns each source's part of the mixture; they sum to 1, exactly where no root is taken.

    Args:
        counts: Rows of each source.
        rate: ``proportional``: min(n, cap) / sum; the others take its root.
        cap: Most rows that count.
        temperature: T of ``temperature``.
        replay: Source to its fixed part; the others share what is left.
    """
    power = {"proportional": Fraction(1), "square_root": Fraction(1, 2)}.get(rate, Fraction(1) / Fraction(temperature))
    parts: dict[str, Any] = {}
    for source, count in counts.items():
        if source not in replay:
            least = min(count, cap) if cap is not None else count
            parts[source] = Fraction(least) if power == 1 else float(least) ** float(power)
    total = sum(parts.values())
    fixed = {source: Fraction(str(share)) for source, share in replay.items()}
    left: Fraction | float = 1 - sum(fixed.values(), Fraction(0))
    left = left if power == 1 else float(left)
    mixed = {source: left * part / total for source, part in parts.items()} if total else {}
    return {source: fixed[source] if source in fixed else mixed.get(source, Fraction(0)) for source in counts}


def whole_parts(rates: Mapping[str, Fraction | float], total: int) -> dict[str, int]:
    """Returns whole numbers that sum to ``total``, by largest remainder; ties go to the first."""
    exact = {source: rate * total for source, rate in rates.items()}
    out = {source: int(value) for source, value in exact.items()}
    order = sorted(exact, key=lambda source: out[source] - exact[source])
    for source in order[: total - sum(out.values())]:
        out[source] += 1
    return out


def quotas(
    found: Mapping[str, Found], clusters: Mapping[str, str], rates: Mapping[str, Fraction | float], rows: int
) -> dict[str, Quota]:
    """Returns what every source gives to a mixture of ``rows`` rows.

    Args:
        found: Source to its training rows.
        clusters: Source to its cluster.
        rates: Of ``task_rates``.
        rows: Rows of the whole mixture.
    """
    out = {}
    for source, count in whole_parts(rates, rows).items():
        hashes = found[source].hashes
        extra = count % len(hashes) if len(hashes) else 0
        bound = int(np.partition(hashes, extra - 1)[extra - 1]) if extra else -1
        out[source] = Quota(source, clusters[source], len(hashes), float(rates[source]), count, bound)
    return out


def mixed(items: Iterable[Record | Reject], quota: Quota) -> Iterator[Record | Reject]:
    """Yields the rows that a source gives, in its order; a row that comes again has ``~2`` after its id.

    Rejects are passed on: they belong to what was read.
    """
    whole = quota.rows // quota.found if quota.found else 0
    extra = quota.rows - whole * quota.found
    for item in items:
        if isinstance(item, Reject):
            yield item
            continue
        times = whole
        if extra and id_hash(item.id, "source") <= quota.bound:
            times, extra = whole + 1, extra - 1
        for at in range(times):
            yield item if at == 0 else replace(item, id=f"{item.id}~{at + 1}")


def source_clusters(sources: Sequence[str], clusters: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Returns each source's cluster; a source that none names is a cluster of its own.

    Raises:
        RecipeError: A cluster names an unknown source, or two name the same.
    """
    out: dict[str, str] = {}
    for cluster, members in clusters.items():
        for source in members:
            if source not in sources:
                raise _unknown("build.mixture.clusters names the unknown source", source, sources, "unknown_source")
            if source in out:
                raise RecipeError(
                    f"the source {source!r} is in two clusters: {out[source]} and {cluster}",
                    "leave it in one",
                    "two_clusters",
                )
            out[source] = cluster
    return {source: out.get(source, source) for source in sources}


def check_held_out(hold_out: Sequence[str], clusters: Mapping[str, str]) -> None:
    """Raises RecipeError unless every held-out cluster is one.

    Args:
        hold_out: Names of clusters.
        clusters: Of ``source_clusters``.
    """
    known = sorted(set(clusters.values()))
    for name in hold_out:
        if name not in known:
            raise _unknown("build.mixture.hold_out names the unknown cluster", name, known, "unknown_cluster")


def _unknown(what: str, name: str, known: Sequence[str], code: str) -> RecipeError:
    near = difflib.get_close_matches(name, known, 1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return RecipeError(f"{what} {name!r}", f"{guess}there are: {', '.join(known)}", code)
