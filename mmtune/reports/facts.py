"""What a report says of the training behind the tuned model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_METHODS = {
    "lora": "LoRA, r {r}, alpha {alpha:g}",
    "full": "all weights",
    "ia3": "IA3",
    "prompt": "prompt tuning",
    "prefix": "prefix tuning",
    "p_tuning": "P-tuning",
}


def training_facts(
    settings: Mapping[str, Any], facts: Mapping[str, Any], rows: int, seconds: float | None
) -> dict[str, str]:
    """Returns label and value of every fact that is known.

    Args:
        settings: The ``finetune`` section that adapter/ was made with.
        facts: The facts in adapter/'s manifest.
        rows: Training rows.
        seconds: How long tuning took.
    """
    lora = settings.get("lora", {})
    towers: Mapping[str, Mapping[str, Any]] = facts.get("towers", {})
    trained = sum(int(tower.get("trainable", 0)) for tower in towers.values())
    shown = {
        "method": _METHODS[facts["method"]].format(r=lora.get("r"), alpha=lora.get("alpha", 0)),
        "towers": ", ".join(settings.get("train", ())),
        "trained parameters": f"{trained:,}" if trained else "",
        "rows": f"{rows:,}" if rows else "",
        "steps": f"{facts['steps']:,}" if facts.get("steps") else "",
        "last training loss": _decimals(facts.get("loss")),
        "parts of that loss": _loss_parts(facts),
        "validation loss": _decimals(facts.get("val_loss")),
        "peak learning rate": f"{settings['learning_rate']:g}" if settings.get("learning_rate") else "",
        "seconds": _decimals(seconds, 1),
    }
    return {key: value for key, value in shown.items() if value}


def _loss_parts(facts: Mapping[str, Any]) -> str:
    """Returns what a training loss with an auxiliary share is made of; empty for any other."""
    share, parts = facts.get("auxiliary_loss"), facts.get("loss_parts", {})
    if not share:
        return ""
    alone = {name.removeprefix("loss_alone_"): value for name, value in parts.items() if name != "loss_mixture"}
    passes = ", ".join(f"{name} {_decimals(value)}" for name, value in alone.items())
    mixture = f"{1 - share:g} × mixture {_decimals(parts.get('loss_mixture'))}, " if share < 1 else ""
    return f"{mixture}{share:g} × the mean of each pass alone ({passes})"


def _decimals(value: Any, places: int = 4) -> str:
    return f"{value:.{places}f}" if isinstance(value, int | float) else ""
