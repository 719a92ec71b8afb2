"""The base model that an adapter was tuned from, wherever it stands by now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtune.errors import IntegrityError, RecipeError
from mmtune.models.digest import weights_digest


@dataclass(frozen=True)
class Base:
    """A base model at hand.

    Attributes:
        path: Folder or hub id.
        revision: Branch, tag or commit of a hub model; None for the newest.
        weights: Its ``weights_digest``.
    """

    path: str
    revision: str | None
    weights: str


def base_at(path: str, revision: str | None, *, offline: bool = False) -> Base:
    """Returns a model as a base, with its digest.

    Raises:
        CapabilityError: As ``weights_digest``.
        RecipeError: The folder is not there.
    """
    return Base(path, revision, weights_digest(path, revision=revision, offline=offline))


def base_of(made: Mapping[str, Any] | None, named: tuple[str, str | None] | None, *, offline: bool = False) -> Base:
    """Returns the base model of adapter/: the one that a recipe names, since it may have moved; else the adapter's own.

    Args:
        made: What adapter/ was made with: ``model``, its ``revision`` and the digest of its ``weights``; None where the
            base alone is asked.
        named: Folder or hub id in the recipe and its revision; None where it names no model.
        offline: Never reach for the network.

    Raises:
        CapabilityError: As ``weights_digest``.
        IntegrityError: The model has other weights than the adapter was tuned from, or stands in a folder where it was
            a hub's before, or the other way round: a folder is known by its bytes, a hub's model by its commit.
        RecipeError: No model is named, or its folder is not there.
    """
    if made is None:
        if named is None:
            raise RecipeError("the recipe names no model", "add `model: {path: ...}`")
        return base_at(*named, offline=offline)
    own = str(made["model"])
    base = _own(own, made.get("revision"), offline) if named is None else base_at(*named, offline=offline)
    if base.weights != made.get("weights"):
        moved = base.path != own
        raise IntegrityError(
            f"the model {base.path} is another one than adapter/ was tuned from"
            + (f", which was {own}" if moved else ""),
            _way_back(base, own, str(made.get("weights"))) + ", or run: mmtune finetune --force",
            "other_model",
        )
    return base


def _way_back(base: Base, own: str, weights: str) -> str:
    if base.path != own:
        return "bring that one back or name it"
    if not Path(own).is_dir():
        # Of a hub model the digest is its commit.
        return f"name the commit: `model: {{revision: {weights}}}`"
    return "bring that one back"


def _own(path: str, revision: str | None, offline: bool) -> Base:
    if path.startswith("/") and not Path(path).is_dir():
        raise RecipeError(
            f"adapter/ was tuned from the model {path}, which is not there",
            "name where it is by now: `model: {path: ...}`",
            "model_missing",
        )
    return base_at(path, revision, offline=offline)
