"""How well generators fill in the code of a part that a row lacks, measured on rows that have it.

Shapes: N rows that have both parts, P distinct media, B rows of a batch, C width of a code.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch.nn import functional

from mmtune.training.heads import coded, filled
from mmtune.training.learner import Learner


@dataclass(frozen=True)
class Filling:
    """How well a part's code is filled in from another's.

    Attributes:
        missing: The part that is filled in.
        source: The part that it is made from.
        rows: N.
        error: Mean squared distance to the true codes over their variance; 1 is what their mean would reach.
        recall: Share of rows whose filled-in code is nearer, by its cosine, to the true one than to all others.
        pool: P, what the nearest is looked for among.
    """

    missing: str
    source: str
    rows: int
    error: float
    recall: float
    pool: int


Keyed = tuple[Mapping[str, torch.Tensor], Mapping[str, Sequence[int]]]
"""A padded batch, and the rows' keys by part, see ``paired.part_key``."""


def rows_to_fill(taught: Collection[str], sources: Sequence[str]) -> list[int]:
    """Returns the rows of the sources that codes were learned from; all rows where none is of them.

    What shows two media that do not belong together has nothing to be filled in.

    Args:
        taught: Ids of the sources that codes were learned from; empty for all.
        sources: Of the rows, in order.
    """
    return [row for row, source in enumerate(sources) if source in taught] or list(range(len(sources)))


@torch.no_grad()
def measure_filling(learner: Learner, batches: Iterable[Keyed]) -> list[Filling]:
    """Returns how well media are filled in, per pair of parts that two rows or more show.

    Args:
        learner: From ``heads.load_heads``, trained by the adversarial objective.
        batches: The rows.
    """
    parts = learner.settings.codes.parts
    codes: dict[str, list[torch.Tensor]] = {part: [] for part in parts}
    present, keys = [], dict[str, list[int]]({part: [] for part in parts})
    for batch, own_keys in batches:
        made, present_BK = coded(learner, batch)
        present.append(present_BK)
        nothing = torch.zeros_like(next(iter(made.values())))
        for part in parts:
            codes[part].append(made.get(part, nothing))
            keys[part] += own_keys[part]
    has = torch.cat(present)
    every = {part: torch.cat(own) for part, own in codes.items()}
    found = []
    for source, missing in permutations(parts, 2):
        both = has[:, parts.index(source)] & has[:, parts.index(missing)]
        if missing != "text" and int(both.sum()) > 1:
            shown = torch.tensor(keys[missing], device=both.device)[both]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(learner.settings.seed)
                made_NC = filled(learner, every[source][both], source, missing)
            error, recall, pool = compared(made_NC, every[missing][both], shown)
            found.append(Filling(missing, source, int(both.sum()), error, recall, pool))
    return found


def compared(made_NC: torch.Tensor, true_NC: torch.Tensor, keys_N: torch.Tensor) -> tuple[float, float, int]:
    """Returns error, recall and pool of filled-in codes, see ``Filling``.

    Args:
        made_NC: Filled in.
        true_NC: The true ones.
        keys_N: Equal where rows show the same medium.
    """
    made_NC, true_NC = made_NC.float(), true_NC.float()
    spread = true_NC.var(0, correction=0).sum().clamp(min=1e-6)
    error = (made_NC - true_NC).square().sum(1).mean() / spread
    distinct, medium_N = torch.unique(keys_N, return_inverse=True)
    pool_PC = torch.zeros(len(distinct), true_NC.shape[1], device=true_NC.device).index_copy(0, medium_N, true_NC)
    nearest_N = (functional.normalize(made_NC, dim=1) @ functional.normalize(pool_PC, dim=1).T).argmax(1)
    return float(error), float((nearest_N == medium_N).float().mean()), len(distinct)
