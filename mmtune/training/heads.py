"""The heads of a pretrained base, kept beside it: codes of a row's parts, and what fills in a missing one.

Shapes: B rows, C width of a code, D numbers of a summary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mmtune.errors import DataError, IntegrityError
from mmtune.files import write_tensors
from mmtune.training.learner import CodeSettings, Learner, LearnerSettings
from mmtune.training.pair_losses import TextMasking

FOLDER = "heads"
_SETTINGS, _WEIGHTS = "heads.json", "heads.safetensors"


def save_heads(learner: Learner, base: Path) -> None:
    """Writes the heads of a learner into ``base/heads``; nothing where it has none."""
    if not len(learner.heads):
        return
    folder = base / FOLDER
    folder.mkdir()
    (folder / _SETTINGS).write_text(json.dumps(asdict(learner.settings), indent=1), "utf-8")
    write_tensors(folder / _WEIGHTS, {name: own.cpu().contiguous() for name, own in learner.heads.state_dict().items()})


def has_generators(base: Path) -> bool:
    """Says whether the heads beside a base fill in missing parts, which the adversarial objective teaches."""
    settings = base / FOLDER / _SETTINGS
    return settings.is_file() and "adversarial" in json.loads(settings.read_text("utf-8"))["weights"]


def load_heads(model: Any, base: Path) -> Learner:
    """Returns the learner that a base was trained by, in evaluation mode.

    Args:
        model: The base model.
        base: Its folder.

    Raises:
        DataError: Its objectives had no heads.
        IntegrityError: They are of another version.
    """
    from safetensors.torch import load_file

    folder = base / FOLDER
    if not (folder / _SETTINGS).is_file():
        raise DataError(
            f"{base} has no heads", "pretrain it with reconstruction, adversarial or contrastive", "no_heads"
        )
    kept = json.loads((folder / _SETTINGS).read_text("utf-8"))
    try:
        named = {name: tuple(kept["codes"].get(name, ())) for name in ("parts", "sources")}
        codes = CodeSettings(**{**kept["codes"], **named})
        text = TextMasking(**{**kept["text"], "special_ids": tuple(kept["text"]["special_ids"])})
        learner = Learner(model, LearnerSettings(kept["weights"], codes, text, kept["seed"], {}))
        learner.heads.load_state_dict(load_file(folder / _WEIGHTS))
    except (KeyError, TypeError, RuntimeError) as error:
        raise IntegrityError(
            f"the heads in {folder} are not those that this version makes",
            "run: mmtune pretrain --force",
            "other_heads",
        ) from error
    return learner.eval()


def codes_of(learner: Learner, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns ``(B, C)`` the code of every part in a batch; that of a row without the part means nothing.

    Args:
        learner: From ``load_heads``.
        batch: Padded rows.
    """
    return coded(learner, batch)[0]


@torch.no_grad()
def coded(learner: Learner, batch: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Returns what ``codes_of`` does, and ``(B, K)`` which rows have the parts of the heads."""
    heads: Any = learner.heads["codes"]
    pooled, present_BK = learner.pooled(batch)
    return {name: heads.code(name, own) for name, own in pooled.items()}, present_BK


@torch.no_grad()
def filled(learner: Learner, codes_BC: torch.Tensor, one: str, other: str) -> torch.Tensor:
    """Returns ``(B, C)`` codes of a missing part, made from those of one that is there.

    Args:
        learner: From ``load_heads``, trained by the adversarial objective.
        codes_BC: Of ``one``.
        one: The part that is there.
        other: The part that is missing.
    """
    heads: Any = learner.heads["codes"]
    made: torch.Tensor = heads.game.fill(one, other, codes_BC)
    return made


@torch.no_grad()
def decoded(learner: Learner, codes_BC: torch.Tensor, part: str) -> torch.Tensor:
    """Returns ``(B, D)`` what codes say of a part in short: such as the 8 x 8 means of a picture, channel by channel.

    Args:
        learner: From ``load_heads``, trained by the reconstruction objective.
        codes_BC: Of any part.
        part: The part to decode.
    """
    heads: Any = learner.heads["codes"]
    told = heads.told[part]
    made: torch.Tensor = heads.autoencoder.decoders[part](codes_BC) * told.deviation + told.mean
    return made
