"""Which answerers a report compares: those that differ in one thing, so that a difference has one cause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

Pair = tuple[str, str]
"""Names of two answerers; the second is compared with the first."""


@dataclass(frozen=True, slots=True)
class Answerer:
    """A model asked in some way.

    Attributes:
        name: As the report has it.
        tuned: Whether it has the adapter.
        prompted: Whether it is asked with the searched prompt.
        shots: Exemplars before its questions.
        how: How these are chosen; of no meaning without any.
        joined: Whether it is an ensemble: several prompts together in place of one.
    """

    name: str
    tuned: bool = False
    prompted: bool = False
    shots: int = 0
    how: str = ""
    joined: bool = False


def answerer(model: str, way: str) -> str:
    """Returns the name of a model asked in a way, as the report has it; an empty way names none."""
    return f"{model}, {way}" if way else model


def pairs_of(answerers: Sequence[Answerer]) -> list[Pair]:
    """Returns the pairs that differ in one thing: tuning, the prompt (or several of them), or the exemplars.

    Of several numbers of exemplars each is compared with none, and with the next smaller one of the same choice. One
    pair differs in two things and is there too: tuning beside a better prompt, which may do as well. Tuning comes
    first, the most exemplars before fewer.

    Args:
        answerers: In the order of the report.
    """
    found: list[tuple[int, int, Pair]] = []
    for one, two in combinations(answerers, 2):
        rank = _rank(one, two, answerers)
        if rank is not None:
            found.append((rank, -one.shots if rank < _EXEMPLARS else 0, (one.name, two.name)))
    return [pair for *_, pair in sorted(found, key=lambda item: item[:2])]


def leading_pair(answerers: Sequence[Answerer]) -> Pair | None:
    """Returns the pair that a report opens with: tuning at the most exemplars, else the last against the first of what
    is compared; None where nothing is.
    """
    pairs = pairs_of(answerers)
    if not pairs:
        return None
    own = {one.name: one for one in answerers}
    tuning = [pair for pair in pairs if own[pair[0]].tuned != own[pair[1]].tuned]
    plain = [pair for pair in tuning if not any(own[name].prompted or own[name].joined for name in pair)]
    most = [pair for pair in plain if own[pair[0]].shots == own[plain[0][0]].shots]
    return (most or tuning or pairs)[-1]


_TUNING, _INSTEAD, _PROMPT, _EXEMPLARS = range(4)


def _rank(one: Answerer, two: Answerer, all_of_them: Sequence[Answerer]) -> int | None:
    """Returns the place of a pair's kind, or None where it is not compared."""
    tuning, prompt = one.tuned != two.tuned, one.prompted != two.prompted
    exemplars = (one.shots, one.how if one.shots else "") != (two.shots, two.how if two.shots else "")
    if one.joined != two.joined:
        return None if tuning or prompt or exemplars else _PROMPT
    if exemplars:
        return _EXEMPLARS if not tuning and not prompt and _neighbours(one, two, all_of_them) else None
    if tuning and prompt:
        return _INSTEAD if (one.tuned, one.prompted) in ((False, True), (True, False)) else None
    return _TUNING if tuning else _PROMPT


def _neighbours(one: Answerer, two: Answerer, all_of_them: Sequence[Answerer]) -> bool:
    low, high = sorted((one.shots, two.shots))
    if low == 0 or low == high:
        return True
    between = any(low < other.shots < high for other in all_of_them if other.how == one.how)
    return one.how == two.how and not between
