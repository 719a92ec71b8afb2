"""Several prompts that answer together: by the mean of their probabilities, or by the commonest answer.

The mean over templates, and over soft prompts of one frozen base, where options are ranked; the majority of what they
say otherwise (Lester et al. 2021, arXiv:2104.08691, section 6).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from mmtune.evaluation.ranking import Shares


def mean_shares(members: Sequence[Mapping[int, np.ndarray]]) -> Shares:
    """Returns per row the log of the mean probability of each option, over the members that ranked the row.

    Args:
        members: Row to ``(L,)`` log-probabilities, 1 in sum; the options of a row stand in one order in all of them.
    """
    rows = dict.fromkeys(row for member in members for row in member)
    own = {row: [member[row] for member in members if row in member] for row in rows}
    return {row: np.logaddexp.reduce(found, axis=0) - np.log(len(found)) for row, found in own.items()}


def majority_of(said: Sequence[str]) -> str:
    """Returns the commonest answer, of equally common ones the first."""
    return Counter(said).most_common(1)[0][0]


def together(
    texts: Sequence[Sequence[str]], shares: Sequence[Mapping[int, np.ndarray]], options: Sequence[Sequence[str]]
) -> list[str]:
    """Returns what members answer together: the option of the highest mean probability, else the commonest answer.

    Args:
        texts: Answers of every member to all rows.
        shares: Of every member, see ``mean_shares``.
        options: Of every row.
    """
    mean = mean_shares(shares)
    votes = [majority_of(said) for said in zip(*texts, strict=True)]
    return [options[row][int(mean[row].argmax())] if row in mean else text for row, text in enumerate(votes)]
