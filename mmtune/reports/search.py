"""A prompt search as text: how the best score rose with the calls, and the best prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60
_SHOWN = 5
_MOST_CHARS = 100


def search_facts(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the course of a search.

    Args:
        lines: Of ``trace.jsonl``.

    Returns:
        ``scored`` and ``proposals_asked``, steps of each kind; ``calls`` in all; ``rises``, the calls and the best mean
        reward on all dev rows where it rose; ``prompts``, the best of those that were scored on all dev rows.
    """
    scores = [line for line in lines if line["kind"] == "score"]
    rises = [
        line
        for at, line in enumerate(scores)
        if line["best"] is not None and (not at or line["best"] > _before(scores, at))
    ]
    full = sorted((line for line in scores if line["full"]), key=lambda line: -line["score"])
    return {
        "scored": len(scores),
        "proposals_asked": sum(line["kind"] == "proposal" for line in lines),
        "calls": scores[-1]["calls"] if scores else 0,
        "rises": [{"calls": line["calls"], "best": line["best"]} for line in rises],
        "prompts": [
            {"score": line["score"], "calls": line["calls"], **_told(line["candidate"])} for line in full[:_SHOWN]
        ],
    }


def _told(candidate: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is said of a prompt: of soft tokens that they are some."""
    return {"soft": True} if "z" in candidate else dict(candidate)


def _before(scores: Sequence[Mapping[str, Any]], at: int) -> float:
    best = scores[at - 1]["best"]
    return float("-inf") if best is None else float(best)


def sparkline(rises: Sequence[Mapping[str, Any]], calls: int, width: int = _WIDTH) -> str:
    """Returns the best score over the calls as one line of bars from 0, so that a small rise looks small.

    Args:
        rises: Of ``search_facts``.
        calls: Of the whole search.
        width: Number of bars.
    """
    if not rises:
        return ""
    low, high = min(0.0, rises[0]["best"]), max(0.0, rises[-1]["best"])
    bars = []
    for column in range(width):
        reached = [one["best"] for one in rises if one["calls"] <= calls * (column + 1) / width]
        level = (reached[-1] - low) / (high - low) if reached and high > low else 0.0
        bars.append(_BARS[round(level * (len(_BARS) - 1))] if reached else " ")
    return "".join(bars)


def search_lines(name: str, facts: Mapping[str, Any]) -> list[str]:
    """Returns a search as lines for a terminal.

    Args:
        name: Of the method.
        facts: Of ``search_facts``.
    """
    rises = facts["rises"]
    if not rises:
        return [f"{name}: no prompt was scored on all dev rows"]
    out = [
        f"{name}: best mean reward {rises[0]['best']:.4f} to {rises[-1]['best']:.4f} in {facts['calls']:,} calls",
        f"  |{sparkline(rises, facts['calls'])}|",
    ]
    for one in facts["prompts"]:
        text = one.get("instruction", "soft tokens")
        shown = len(one.get("exemplars", ()))
        more = f" + {shown} {'exemplar' if shown == 1 else 'exemplars'}" if shown else ""
        more += f", words {one['verbalizer']}" if one.get("verbalizer") else ""
        said = text if len(text) <= _MOST_CHARS else text[: _MOST_CHARS - 1] + "…"
        out.append(f"  {one['score']:.4f} at {one['calls']:>6,}  {said!r}{more}")
    return out
