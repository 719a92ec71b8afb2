"""Which encoder makes the features of each kind, and what changes when it does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtune.errors import RecipeError
from mmtune.features.units import FeatureKind, Unit
from mmtune.models.digest import weights_digest
from mmtune.models.inputs import FIRST_ITEM, ITEMS, Kind, processor_digest
from mmtune.recipe import BASE, Extract, Recipe
from mmtune.storage import stage_hash

_SMALL = {"image": "PatchesConfig", "audio": "LogMelConfig", "behaviour": "HistoryConfig"}
_LAYERS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "layer_norm_eps",
    "initializer_range",
)
SETTINGS = {
    "image": (*_LAYERS, "image_size", "patch_size", "image_mean", "image_std"),
    "audio": (*_LAYERS, "num_mel_bins", "sampling_rate", "n_fft", "hop_length", "mel_mean", "mel_std"),
    "behaviour": (*_LAYERS, "window"),
}
"""What may be set of a small encoder; written out here because its config class brings torch."""


TIMES_SECONDS = (0.1, 1000.0)
"""Shortest and longest wave that tells when a frame is shown; written out here because its module brings torch."""


@dataclass(frozen=True)
class Chosen:
    """The encoder of one kind of unit.

    Attributes:
        encodes: What the encoder itself takes; frames of a video are images.
        path: Folder or hub id; of a small encoder empty until it is written.
        revision: Branch, tag or commit.
        pool: How tokens become one vector.
        built: Settings of a small encoder, its items and seed, or None.
        identity: What its features depend on, as plain values.
    """

    encodes: Kind
    path: str
    revision: str | None
    pool: Any
    built: Mapping[str, Any] | None
    identity: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """A sha256 of ``identity``."""
        return stage_hash(self.identity)


def choose(
    recipe: Recipe,
    settings: Extract,
    units: Mapping[FeatureKind, Sequence[Unit]],
    trained_items: Sequence[str],
    offline: bool,
) -> dict[FeatureKind, Chosen]:
    """Returns the encoder of every kind that there are units of.

    Args:
        recipe: For the base model, seed and limits.
        settings: The recipe's extract part.
        units: By kind.
        trained_items: Items that a small encoder of behaviour knows.
        offline: Never reach for the network.

    Raises:
        RecipeError: No encoder is named and the base model cannot serve, or its settings are unknown.
        CapabilityError: A hub model is not at hand.
    """
    return {kind: _choose(recipe, settings, kind, trained_items, offline) for kind in units}


def _choose(recipe: Recipe, settings: Extract, kind: FeatureKind, items: Sequence[str], offline: bool) -> Chosen:
    encodes: Kind = "image" if kind == "video" else kind
    named = getattr(settings.encoders, encodes)
    kept = _kept(recipe, settings, kind)
    if named is not None and named.config is not None:
        known = list(items) if encodes == "behaviour" else []
        built = {"kind": encodes, "config": _checked(encodes, named.config), "items": known, "seed": recipe.seed}
        return Chosen(encodes, "", None, named.pool, built, {"built": stage_hash(built), "pool": named.pool, **kept})
    own = named is None or named.path == BASE
    if own and (recipe.model is None or encodes == "behaviour"):
        small = f"{{{encodes}: {{config: {{hidden_size: 64}}}}}}"
        of_base = named is not None and encodes == "behaviour"
        raise RecipeError(
            f"the sources hold {kind}, and "
            + ("the base model gives no features of it" if of_base else "no encoder of it is named")
            + ("" if encodes == "behaviour" else "; the recipe has no base model either"),
            f"add `extract: {{encoders: {{{encodes}: FOLDER_OR_HUB_ID}}}}`"
            + ("" if encodes == "text" else f", or a small one: `encoders: {small}`")
            + ", or name the wanted ones in extract.modalities",
            "no_encoder",
        )
    base = recipe.model
    path, revision = (base.path, base.revision) if own else (named.path, named.revision)  # type: ignore[union-attr]
    pool = "auto" if named is None else named.pool
    identity = {
        "path": path,
        "weights": weights_digest(path, revision=revision, offline=offline),
        "processor": processor_digest(path),
        "pool": pool,
        **kept,
    }
    return Chosen(encodes, path, revision, pool, None, identity)


def _kept(recipe: Recipe, settings: Extract, kind: FeatureKind) -> dict[str, Any]:
    """Returns what the features of a kind depend on besides their encoder."""
    build = recipe.build
    pixels, sound = {"max_pixels": build.max_image_pixels}, {"max_seconds": build.max_audio_seconds}
    video = {
        "frames": settings.video_frames,
        "times_seconds": list(TIMES_SECONDS),
        "max_seconds": build.max_video_seconds,
        **pixels,
    }
    limits: dict[str, dict[str, Any]] = {"image": pixels, "audio": sound, "video": video}
    kept = {"tokens": settings.tokens, "dtype": settings.dtype, "batch_rows": settings.batch_rows}
    return {**kept, **limits.get(kind, {})}


def _checked(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    known = SETTINGS[kind]
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise RecipeError(
            f"extract.encoders.{kind}.config has the unknown setting {unknown[0]!r}",
            f"known: {', '.join(sorted(known))}",
            "unknown_setting",
        )
    for name, value in config.items():
        if name.endswith("_std") and not (type(value) in (int, float) and value > 0):
            raise RecipeError(
                f"extract.encoders.{kind}.config.{name}: {value!r} is no number above 0",
                "check the values",
                "bad_setting",
            )
    return dict(config)


def write_small(chosen: Chosen, folder: Path) -> Path:
    """Writes a small encoder with seeded random weights and its processor; returns its folder.

    Raises:
        RecipeError: The settings do not fit together.
    """
    import torch
    from transformers import AutoModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    from mmtune.models import encoders
    from mmtune.models.log_mel import LogMelFeatureExtractor
    from mmtune.models.save import save_model

    assert chosen.built is not None
    kind, settings, items = (chosen.built[name] for name in ("kind", "config", "items"))
    more = {"vocab_size": FIRST_ITEM + len(items)} if kind == "behaviour" else {}
    config = getattr(encoders, _SMALL[kind])(**settings, **more)
    if config.hidden_size % (2 * config.num_attention_heads):
        raise RecipeError(
            f"extract.encoders.{kind}.config: hidden_size {config.hidden_size} is no multiple of twice"
            f" num_attention_heads ({config.num_attention_heads})",
            "choose another hidden_size",
            "bad_setting",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.built["seed"])
        save_model(AutoModel.from_config(config), folder)
    if kind == "image":
        square = {"height": config.image_size, "width": config.image_size}
        normal: Any = {name: [getattr(config, name)] * config.num_channels for name in ("image_mean", "image_std")}
        ViTImageProcessorPil(size=square, **normal).save_pretrained(folder)
    elif kind == "audio":
        names = ("sampling_rate", "n_fft", "hop_length", "mel_mean", "mel_std")
        LogMelFeatureExtractor(config.num_mel_bins, **{name: getattr(config, name) for name in names}).save_pretrained(
            folder
        )
    else:
        (folder / ITEMS).write_text(json.dumps(items, ensure_ascii=False), "utf-8")
    return folder
