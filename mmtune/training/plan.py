"""Which trees make which step: a pure function of (seed, epoch, position).

Nothing about the order is ever stored but one integer, the number of finished steps. The
order does not depend on processes or workers; a step is ``world x accumulate`` consecutive
micro batches, so a run keeps its sequence as long as that product stays the same, or as
smaller micro batches are cut from those of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmtune.errors import DataError


@dataclass(frozen=True)
class TreeSizes:
    """Per row or tree: number of rows, tokens, tokens that bear loss, and media tokens.

    Attributes:
        rows: ``(n,)`` branches of each tree.
        tokens: ``(n,)`` tokens of its longest row; of a tree that is packed, all of them.
        targets: ``(n,)`` tokens with a label.
        media: ``(n,)`` media tokens, which stand for the towers' work.
    """

    rows: np.ndarray
    tokens: np.ndarray
    targets: np.ndarray
    media: np.ndarray


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Returns the permutation of ``n`` trees for one epoch, from a counter-based generator."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Returns the seed of everything random inside one step on one rank (dropout)."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def row_batches(
    units: np.ndarray,
    sizes: TreeSizes,
    *,
    batch_tokens: int,
    batch_rows: int | None = None,
    batch_media_tokens: int | None = None,
) -> list[np.ndarray]:
    """Returns units cut, in their order, into micro batches of padded rows; what is over a limit stands alone."""
    batches: list[np.ndarray] = []
    current: list[int] = []
    rows = longest = media = 0
    for unit in units:
        more, length, shown = int(sizes.rows[unit]), int(sizes.tokens[unit]), int(sizes.media[unit])
        full = (rows + more) * max(longest, length) > batch_tokens
        full |= batch_rows is not None and rows + more > batch_rows
        full |= batch_media_tokens is not None and media + shown > batch_media_tokens
        if current and full:
            batches.append(np.asarray(current))
            current, rows, longest, media = [], 0, 0, 0
        current.append(unit)
        rows, longest, media = rows + more, max(longest, length), media + shown
    batches.append(np.asarray(current))
    return batches


@dataclass(frozen=True)
class Plan:
    """The whole course of a run.

    Attributes:
        sizes: Sizes of the trees.
        seed: Seed of the order.
        batch_tokens: Most padded tokens of a micro batch.
        batch_rows: Most rows of a micro batch, or None.
        micro_batches: Micro batches per step, over all processes.
        epochs: Passes over the data.
        max_steps: Steps, in place of ``epochs``.
        batch_media_tokens: Most media tokens of a micro batch, or None.
        packed: Epoch to micro batches of packed trees; None when the rows of trees train apart.
        cut: Micro batch to smaller ones that run in its place, or None.
    """

    sizes: TreeSizes
    seed: int
    batch_tokens: int
    batch_rows: int | None
    micro_batches: int
    epochs: float
    max_steps: int | None = None
    batch_media_tokens: int | None = None
    packed: Callable[[int], list[np.ndarray]] | None = None
    cut: Callable[[np.ndarray], list[np.ndarray]] | None = None

    def epoch_batches(self, epoch: int) -> list[np.ndarray]:
        """Returns the micro batches of an epoch; every tree stands in exactly one."""
        if self.sizes.rows.size == 0:
            raise DataError("there is no training row", "look at the rejects of build-data and tokenize", "no_rows")
        if self.packed is not None:
            return self.packed(epoch)
        return row_batches(
            order(self.seed, epoch, self.sizes.rows.size),
            self.sizes,
            batch_tokens=self.batch_tokens,
            batch_rows=self.batch_rows,
            batch_media_tokens=self.batch_media_tokens,
        )

    def run_batches(self, epoch: int) -> list[np.ndarray]:
        """Returns the micro batches of an epoch as they run, cut where the plan cuts them."""
        return self._cut(self.epoch_batches(epoch))

    def _cut(self, batches: list[np.ndarray]) -> list[np.ndarray]:
        return batches if self.cut is None else [part for batch in batches for part in self.cut(batch)]

    def _steps_of(self, batches: int) -> int:
        return -(-batches // self.micro_batches)

    @cached_property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, at least one."""
        if self.max_steps is not None:
            return self.max_steps
        whole = int(self.epochs)
        steps = sum(self._steps_of(len(self.epoch_batches(epoch))) for epoch in range(whole))
        rest = self.epochs - whole
        if rest > 1e-9:
            steps += round(rest * self._steps_of(len(self.epoch_batches(whole))))
        return max(steps, 1)

    def steps(self, start: int = 0) -> Iterator[list[np.ndarray]]:
        """Yields the micro batches of every step from ``start`` on; the last step of an epoch may have fewer.

        Where the plan cuts them, a step has more.
        """
        done = epoch = 0
        while done < self.total_steps:
            batches = self.epoch_batches(epoch)
            for index in range(self._steps_of(len(batches))):
                if done >= self.total_steps:
                    return
                if done >= start:
                    yield self._cut(batches[index * self.micro_batches : (index + 1) * self.micro_batches])
                done += 1
            epoch += 1

    def cost(self, batch: np.ndarray) -> int:
        """Returns the tokens of a micro batch: of padded rows, or of packed trees."""
        tokens = self.sizes.tokens[batch]
        return int(tokens.sum() if self.packed is not None else self.sizes.rows[batch].sum() * tokens.max())

    def media(self, batch: np.ndarray) -> int:
        """Returns the media tokens of a micro batch."""
        return int(self.sizes.media[batch].sum())

    def shares(self, batches: Sequence[np.ndarray], rank: int, world: int) -> list[tuple[int, bool]]:
        """Returns what one rank does of a step, see ``split_ranks``."""
        return split_ranks([self.cost(batch) for batch in batches], rank, world)

    def padding(self) -> float:
        """Returns the share of padding among the tokens of the first epoch."""
        padded = sum(self.cost(batch) for batch in self.epoch_batches(0))
        return 1.0 - float((self.sizes.rows * self.sizes.tokens).sum()) / padded

    def targets(self, batches: Sequence[np.ndarray]) -> int:
        """Returns the number of tokens with a label in some micro batches."""
        return int(sum(self.sizes.targets[batch].sum() for batch in batches))


def split_ranks(costs: Sequence[int], rank: int, world: int) -> list[tuple[int, bool]]:
    """Returns one rank's micro batches of a step, as positions in it, with whether each counts.

    Every rank makes the same number of passes. What the ranks do at the same time costs nearly the same, and what
    they do in the whole step too: batches are dealt by falling cost, in turns forward and backward. Where a step has
    too few of them, some ranks repeat the cheapest one with weight zero. Which rank gets which depends on the costs
    alone, so a resumed run deals as the unbroken one did.

    Args:
        costs: Cost of every micro batch of the step, see ``Plan.cost``.
        rank: Whose.
        world: Ranks.
    """
    if world == 1:
        return [(position, True) for position in range(len(costs))]
    falling = sorted(range(len(costs)), key=lambda position: (-costs[position], position))
    mine = []
    for turn in range(-(-len(costs) // world)):
        place = turn * world + (rank if turn % 2 == 0 else world - 1 - rank)
        counts = place < len(costs)
        mine.append((falling[place if counts else -1], counts))
    return mine
