"""Who answers in a report: models, each in every way of asking, and the exemplars' own votes."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from mmtune.evaluation.pairs import Answerer
from mmtune.recipe import Exemplars
from mmtune.stages.evaluate.ensemble import TOGETHER
from mmtune.stages.evaluate.prompted import is_prompted

VOTE = "vote"
"""What exemplars alone would answer, by majority: shown beside the models, no system of its own."""


def answerers_of(
    names: Iterable[str], facts: Sequence[Mapping[str, Any]], members: Collection[str] = ()
) -> list[Answerer]:
    """Returns what tells answerers apart; exemplars' own votes and an ensemble's members are none.

    Args:
        names: Models, and ways of asking behind a comma.
        facts: Of ``shots.Asked``.
        members: Ways that are members of an ensemble.
    """
    ways = {one["name"]: one for one in facts}
    found = []
    for name in names:
        model, _, way = name.partition(", ")
        if model == VOTE or way in members:
            continue
        own = ways.get(way, {"shots": 0})
        how = json.dumps({key: own[key] for key in Exemplars.model_fields if key in own})
        joined = way == TOGETHER
        found.append(Answerer(name, model.startswith("tuned"), is_prompted(model), own["shots"], how, joined))
    return found


def in_order(found: Mapping[str, Any], compare: Sequence[str]) -> dict[str, Any]:
    """Returns what was found by answerer, in the order of ``eval.compare``; the others stay where they are."""
    places = {name: at for at, name in enumerate(compare)}
    return {name: found[name] for name in sorted(found, key=lambda name: places.get(name.partition(", ")[0], -1))}
