"""The features that a run could train on, known before its model is loaded: a tower that need not be, is not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmtune import __version__
from mmtune.errors import CapabilityError
from mmtune.recipe import Finetune
from mmtune.storage import library_versions

MAKERS = ("torch", "transformers", "pillow", "torchvision", "numpy")
"""What a feature depends on beside the weights."""
TOWERS = {"image": "vision", "audio": "audio"}
"""The tower that sees or hears a kind of media."""


@dataclass(frozen=True)
class Wanted:
    """The features of one kind of media that a run could train on.

    Attributes:
        kind: ``image`` or ``audio``.
        media: The distinct media of all splits.
        folder: Where their shards stand.
        source: What makes them.
        dtype: What they are kept in.
        before_projector: They enter a projector that trains.
        found: Bytes of a token, and the difference of the loss, where an earlier run proved the shards that are
            there; its tower then is not loaded.
    """

    kind: str
    media: Any
    folder: Path
    source: str
    dtype: str
    before_projector: bool
    found: tuple[int, float] | None = None

    def shelf(self, row_bytes: int, root: Path) -> Any:
        """Returns the shards, whose tokens take so many bytes each."""
        from mmtune.training.frozen_features import Shelf

        return Shelf(self.media, self.folder, self.source, row_bytes, root)


def wanted_features(
    settings: Finetune,
    folder: Path,
    made_from: Mapping[str, Any],
    splits: Mapping[str, Any],
    precision: str,
    accelerator: Any,
) -> list[Wanted]:
    """Returns the features that the recipe allows and the data could use, before any model is loaded.

    Args:
        settings: The recipe's finetune part.
        folder: Where the shards of all kinds stand.
        made_from: What features depend on, as plain values.
        splits: By name.
        precision: Of the training.
        accelerator: The accelerator.

    Raises:
        CapabilityError: ``use: on`` where features cannot stand for media.
    """
    from mmtune.training.data import media_items
    from mmtune.training.frozen_features import distinct_media

    wish, wanted, reasons = settings.features, [], []
    dtype = precision if wish.dtype == "auto" else wish.dtype
    source = {
        **made_from,
        **{name: version for name, version in library_versions().items() if name in MAKERS},
        "mmtune": __version__,
        "dtype": dtype,
        "precision": precision,
        "device": accelerator.device.type,
        "before_projector": "projector" in settings.train,
    }
    for kind in TOWERS if wish.use != "off" else ():
        token = splits["train"].collate.token_id(kind)
        found = (one for split in splits.values() for one in media_items(split.table, kind, token) if token is not None)
        media = distinct_media(found)
        if media.items and not _changes(settings, kind):
            text = json.dumps({**source, "kind": kind}, sort_keys=True)
            one = Wanted(kind, media, folder / kind, text, dtype, "projector" in settings.train)
            wanted.append(_with_proof(one, settings, splits["train"].collate.media_root, accelerator))
        elif media.reason:
            reasons.append(media.reason)
    if wish.use == "on" and (reasons or not wanted):
        reason = reasons[0] if reasons else "no row has a medium"
        raise CapabilityError(f"finetune.features.use is on, but {reason}", "set it to auto")
    return wanted


def _changes(settings: Finetune, kind: str) -> bool:
    """Says whether features of a kind would be wrong from the second step on; the recipe refuses ``use: on`` then."""
    return (settings.augment is not None and kind == "image") or TOWERS[kind] in settings.train


def _with_proof(wanted: Wanted, settings: Finetune, root: Path, accelerator: Any) -> Wanted:
    """Returns the wish with what an earlier run proved of its shards, if they are all there on every process."""
    from mmtune.training.frozen_features import proved

    found = None if settings.from_scratch else proved(wanted.folder, wanted.source)
    absent = found is None or wanted.shelf(found[0], root).missing()
    if agreed("not there" if absent else "", "looking for features", accelerator):
        return wanted
    return replace(wanted, found=found)


def with_proved(splits: Mapping[str, Any], wanted: Sequence[Wanted]) -> dict[str, Any]:
    """Returns the splits with the features that were proved before, whose towers are not loaded."""
    for one in wanted:
        if one.found:
            features = one.shelf(one.found[0], splits["train"].collate.media_root).features()
            splits = {name: split.with_features(one.kind, features) for name, split in splits.items()}
    return dict(splits)


def agreed(problem: str, what: str, accelerator: Any) -> str:
    """Returns the problem of this process, or of another one."""
    import torch

    from mmtune.training.ranks import sum_tensor

    failed = sum_tensor(torch.tensor([float(bool(problem))], device=accelerator.device), what)
    return problem or ("another process of the run refused" if failed else "")
