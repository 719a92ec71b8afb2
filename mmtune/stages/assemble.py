"""assemble: the parts that pretrain names to start/, an untrained composite model with its processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmtune.errors import DataError, MmtuneError, RecipeError
from mmtune.models.digest import weights_digest
from mmtune.models.inputs import FIRST_ITEM
from mmtune.recipe import Recipe
from mmtune.recipe.pretrain import Parts
from mmtune.storage import foresee, open_split, open_stage, read_manifest, stage_hash
from mmtune.talk import Talk

# What a small encoder of a modality is called by transformers' AutoConfig.
_SMALL = {"image": "mmtune_patches", "audio": "mmtune_log_mel", "behaviour": "mmtune_history"}


def assemble_stage(
    recipe: Recipe, *, force: bool = False, dry_run: bool = False, offline: bool = False, console: Talk
) -> dict[str, Any]:
    """Joins the parts into one model and writes start/; returns the result document.

    Raises:
        RecipeError: The recipe has no ``pretrain``, or its parts do not fit each other.
        CapabilityError: A part is not at hand.
        DataError: An encoder of histories shall be built, and instructions/ holds none.
    """
    if recipe.pretrain is None:
        raise RecipeError("the recipe has no `pretrain` section", "add one: mmtune keys pretrain")
    parts, items = recipe.pretrain.build, training_items(recipe)
    config = {"build": parts.model_dump(mode="json"), "seed": recipe.seed, "weights": _digests(parts, offline)}
    config |= {} if items is None else {"items": stage_hash({"items": items})}
    target = recipe.run_dir / "start"
    if dry_run:
        console.say(foresee(target, stage="assemble", config=config, force=force))
        return {"stage": "assemble", "dry_run": True, "target": str(target), "config": config}
    staging = open_stage(target, stage="assemble", config=config, force=force, say=console.say)
    if staging is None:
        return {"stage": "assemble", "cached": True, "target": str(target), **read_manifest(target).facts}
    from mmtune.models.save import save_model

    with staging:
        model, processor = join(parts, recipe.seed, offline, items)
        save_model(model, staging.path)
        processor.save_pretrained(str(staging.path))
        facts = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "modalities": list(model.config.modalities),
            "branches": list(model.config.branches),
            **({} if processor.items is None else {"items": len(processor.items)}),
        }
        staging.publish(facts=facts)
    fusion = parts.fusion
    beside = "" if fusion.attention == "none" else f" with {fusion.attention}-attention"
    what = f"text and {' and '.join(facts['modalities'])}, {fusion.mode} fusion{beside}"
    console.say(f"assemble: wrote {target} ({facts['parameters']:,} parameters: {what})")
    return {"stage": "assemble", "cached": False, "target": str(target), **facts}


def _digests(parts: Parts, offline: bool) -> dict[str, str]:
    """Returns what changes when a pretrained part does."""
    named: dict[str, Any] = {"text": parts.text}
    named.update({str(name): given for name, given in parts.encoders.items()})
    return {name: _digest(name, path, offline) for name, path in named.items() if isinstance(path, str)}


def _digest(name: str, path: str, offline: bool) -> str:
    """Returns the digest of a part's weights; an error names the part's own key."""
    from mmtune.models.load import load_config

    key = "pretrain.build.text" if name == "text" else f"pretrain.build.encoders.{name}"
    try:
        load_config(path, offline=offline)
        return weights_digest(path, offline=offline)
    except MmtuneError as error:
        hint = error.hint.replace("model.path", key)
        raise type(error)(f"{key}: {error.message}", hint, error.code) from error


def training_items(recipe: Recipe) -> list[str] | None:
    """Returns what the histories of instructions/train are made of, sorted; None where no encoder of them is built.

    Raises:
        DataError: There are no instructions, or no training row has a history with items.
    """
    if recipe.pretrain is None or not recipe.pretrain.build.reads_items:
        return None
    import pyarrow.compute as pc

    read_manifest(recipe.run_dir / "instructions", made_by="build-data")
    table = open_split(recipe.run_dir / "instructions" / "train")
    found = pc.list_flatten(pc.list_flatten(table.column("histories"))) if "histories" in table.column_names else []
    if not len(found):
        raise DataError(
            "pretrain.build.encoders.behaviour: no training row has a history with items",
            "name their column in a source: columns: {behaviour: ...}",
            "no_items",
        )
    return sorted(pc.unique(found).to_pylist())


def join(parts: Parts, seed: int, offline: bool, items: list[str] | None = None) -> tuple[Any, Any]:
    """Returns the composite model and its processor; fresh weights are drawn from the seed.

    Args:
        parts: Of the model.
        seed: Of the fresh weights.
        offline: Never reach for the network.
        items: That a fresh encoder of histories knows.

    Raises:
        RecipeError: Parts do not fit each other, or a config is none.
        CapabilityError: A part is not at hand.
    """
    import torch

    from mmtune.models.composite import register
    from mmtune.models.composite.assemble import assemble

    register()
    tokenizer = None if parts.tokenizer is None else _tokenizer(parts.tokenizer, offline)
    text = parts.text if isinstance(parts.text, str) else _language_config(parts.text, tokenizer)
    encoders: dict[str, Any] = {
        name: given if isinstance(given, str) else _encoder_config(name, given, items)
        for name, given in parts.encoders.items()
    }
    settings: dict[str, Any] = {}
    if getattr(encoders.get("image"), "model_type", "") == _SMALL["image"]:
        # It has no token before the patches, and its last layer is trained with the rest.
        settings = {"vision_feature_layer": None, "vision_feature_select_strategy": "full"}
    projectors: dict[str, dict[str, Any]] = {}
    for name, own in parts.projectors.items():
        resampler = own.kind in ("perceiver", "qformer")
        projectors[name] = own.model_dump() if resampler else {"kind": own.kind, "instruction": own.instruction}
    torch.manual_seed(seed)
    try:
        return assemble(
            text,
            encoders=encoders,
            projectors=projectors,
            fusion=parts.fusion.settings,
            tokenizer=tokenizer,
            preprocessors=None if items is None else {"behaviour": items},
            offline=offline,
            **settings,
        )
    except ValueError as error:
        raise RecipeError(
            f"pretrain.build: {str(error).splitlines()[0]}", "see: mmtune keys pretrain.build", "parts_do_not_fit"
        ) from error


def _tokenizer(path: str, offline: bool) -> Any:
    from mmtune.encoding.processor import load_processor, tokenizer_of
    from mmtune.models.inputs import lacks_tokenizer

    if path.startswith(("/", ".")) and not Path(path).is_dir():
        raise RecipeError(f"pretrain.build.tokenizer: {path} is not there", "give a folder or hub id", "model_missing")
    if lacks_tokenizer(path):
        raise RecipeError(
            f"pretrain.build.tokenizer: {path} has no tokenizer.json", "save a tokenizer there", "no_tokenizer"
        )
    return tokenizer_of(load_processor(path, offline=offline))


def _encoder_config(name: str, given: dict[str, Any], items: list[str] | None) -> Any:
    if name == "behaviour" and items is not None:
        if "vocab_size" in given:
            raise RecipeError(
                "pretrain.build.encoders.behaviour.vocab_size follows from the training rows",
                "leave it out",
                "bad_setting",
            )
        given = {**given, "vocab_size": FIRST_ITEM + len(items)}
    return _config(f"encoders.{name}", {"model_type": _SMALL[name], **given})


def _language_config(values: dict[str, Any], tokenizer: Any) -> Any:
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    return _config("text", {"model_type": "llama", "vocab_size": len(tokenizer), **ids, **values})


def _config(key: str, values: dict[str, Any]) -> Any:
    """Returns a transformers config, refusing a name that it does not have and a value that it does not take."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    kind = str(values["model_type"])
    settings = {name: value for name, value in values.items() if name != "model_type"}
    try:
        plain = AutoConfig.for_model(kind)
    except ValueError as error:
        raise RecipeError(
            f"pretrain.build.{key}: transformers knows no model type {kind!r}", "check model_type", "no_such_model"
        ) from error
    strange = sorted(name for name in settings if not hasattr(plain, name))
    if strange:
        raise RecipeError(
            f"pretrain.build.{key}: a config of {kind} has no {strange[0]!r}", "check the spelling", "no_such_setting"
        )
    if kind in _SMALL.values():
        _check_small(key, plain, settings)
    try:
        return AutoConfig.for_model(kind, **settings)
    except (StrictDataclassError, TypeError, ValueError) as error:
        # The last line says what is wrong, those before it who found it.
        why = str(error).strip().splitlines()[-1].strip()
        raise RecipeError(
            f"pretrain.build.{key}: a config of {kind} refuses this: {why}", "check the values", "bad_setting"
        ) from error


def _check_small(key: str, plain: Any, settings: dict[str, Any]) -> None:
    """Refuses values that a small encoder cannot be made of; its config takes them all."""
    for name, value in settings.items():
        wanted = (
            "above 0" if name.endswith("_std") else "from 0 to below 1" if name == "unknown_rate" else "of 1 or more"
        )
        whole = type(getattr(plain, name)) is int and (type(value) is not int or value < 1)
        deviation = name.endswith("_std") and not (type(value) in (int, float) and value > 0)
        chance = name == "unknown_rate" and not (type(value) in (int, float) and 0 <= value < 1)
        if whole or deviation or chance:
            raise RecipeError(
                f"pretrain.build.{key}.{name}: {value!r} is no number {wanted}", "check the values", "bad_setting"
            )
