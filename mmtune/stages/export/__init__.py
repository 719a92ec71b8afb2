"""export: base and adapter/ to exported/, one model folder that transformers loads and servers serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmtune.errors import IntegrityError, RecipeError
from mmtune.models.digest import weights_digest
from mmtune.recipe import Recipe
from mmtune.recipe.export import Export
from mmtune.storage import Manifest, Staging, foresee, is_finished, open_stage, read_manifest
from mmtune.talk import Talk

__all__ = ["check_export", "export"]
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def check_export(recipe: Recipe) -> None:
    """Refuses a recipe whose export could not end well whatever is trained, before anything is.

    Raises:
        RecipeError: It tunes virtual tokens, or nothing at all and adapter/ is not there.
    """
    from mmtune.models.merged import VIRTUAL

    tuning = recipe.finetune
    if tuning is None and not is_finished(recipe.run_dir / "adapter"):
        raise RecipeError(
            f"there is nothing to export: the recipe has no `finetune`, and {recipe.run_dir / 'adapter'} is not there",
            "add `finetune`, or leave `export` out",
            "no_adapter",
        )
    if tuning is not None and (tuning.method in VIRTUAL or tuning.soft_prompt is not None):
        what = "finetune.soft_prompt" if tuning.method not in VIRTUAL else f"finetune.method: {tuning.method}"
        raise RecipeError(
            f"{what} trains virtual tokens, which no weights can stand for: they cannot be exported",
            "leave `export` out and serve the base model with adapter/, or tune by adapters alone",
            "not_mergeable",
        )


def export(
    recipe: Recipe, *, force: bool = False, dry_run: bool = False, offline: bool = False, console: Talk
) -> dict[str, Any]:
    """Merges the adapter into the weights, writes them with config and processor, reads them back and compares.

    Returns the result document.

    Raises:
        DataError: adapter/ or tokens/ is missing, or a medium of theirs cannot be read.
        RecipeError: What was tuned are virtual tokens.
        IntegrityError: The base is another one by now, or the exported model answers otherwise than the tuned one.
    """
    from mmtune.models.merged import check_mergeable

    settings, folder = recipe.export or Export(), recipe.run_dir / "adapter"
    adapter = read_manifest(folder, made_by="finetune")
    tokens = read_manifest(recipe.run_dir / "tokens", made_by="tokenize")
    check_mergeable(folder, str(adapter.facts.get("method", "")))
    path, revision = _base_of(recipe, adapter)
    config = {
        "export": settings.model_dump(mode="json"),
        "model": path,
        "revision": revision,
        "weights": weights_digest(path, revision=revision, offline=offline),
    }
    if config["weights"] != adapter.config.get("weights"):
        made_from = str(adapter.facts["model"])
        raise IntegrityError(
            f"the model {path} is another one than adapter/ was tuned from"
            + ("" if path == made_from else f", which was {made_from}"),
            "bring that one back" + ("" if path == made_from else " or name it") + ", or run: mmtune finetune --force",
            "other_model",
        )
    parents = {"adapter": adapter.hash, "tokens": tokens.hash}
    target = recipe.run_dir / "exported"
    if dry_run:
        console.say(foresee(target, stage="export", config=config, parents=parents, force=force))
        return {"stage": "export", "dry_run": True, "target": str(target), "config": config}
    staging = open_stage(target, stage="export", config=config, parents=parents, force=force, say=console.say)
    if staging is None:
        return {"stage": "export", "cached": True, "target": str(target), **read_manifest(target).facts}
    with staging:
        facts = _write(recipe, settings, adapter, tokens, staging, offline, console)
        staging.publish(facts=facts)
    _say(facts, target, console)
    return {"stage": "export", "cached": False, "target": str(target), **facts}


def _write(
    recipe: Recipe,
    settings: Export,
    adapter: Manifest,
    tokens: Manifest,
    staging: Staging,
    offline: bool,
    console: Talk,
) -> dict[str, Any]:
    """Fills the folder and returns what the manifest says of it."""
    import torch

    from mmtune.encoding.processor import load_processor
    from mmtune.models.load import load_model, load_tuned
    from mmtune.models.merged import merged
    from mmtune.models.save import save_model
    from mmtune.stages.export.proof import batches_of, losses_of, losses_without_adapters, prove

    folder = recipe.run_dir / "adapter"
    # As it was tuned with: limits of pictures and the chat template among it.
    processor = load_processor(str(folder), offline=offline)
    split, root = next(iter(tokens.rows)), Path(tokens.facts["media_root"])
    rows, batches = batches_of(recipe.run_dir / "tokens", split, settings.rows, processor, root)
    path, revision = _base_of(recipe, adapter)
    attn = recipe.model.attn if recipe.model else "auto"
    model: Any = _placed(load_tuned(path, folder, revision=revision, attn=attn, offline=offline))
    tuned_N, base_N = losses_of(model, batches), losses_without_adapters(model, batches)
    dtype = settings.dtype if settings.dtype != "auto" else _own_dtype(path, revision, offline)
    if adapter.config["finetune"].get("quantize") == "nf4":
        console.note(
            "adapter/ was tuned on 4-bit weights and is merged into the full ones: eval scores it on the former"
        )
    model = merged(model).to(getattr(torch, _DTYPES[dtype]))
    save_model(model, staging.path)
    processor.save_pretrained(str(staging.path))
    kind = str(model.config.model_type)
    if kind.startswith("mmtune_"):
        console.note(
            f"transformers does not know {kind} by itself: where exported/ is loaded, call"
            " mmtune.models.composite.register() first; a server without mmtune cannot serve it"
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    del model
    # In fp32 again: what differs is what the written weights lost, not how a processor computes with fewer bits.
    exported_N = losses_of(_placed(load_model(str(staging.path), attn=attn, offline=True)), batches)
    proof = prove(rows, tuned_N, base_N, exported_N, dtype)
    return {
        "model": path,
        "method": adapter.facts["method"],
        "parameters": parameters,
        "dtype": dtype,
        "rows": proof.rows,
        "tokens": proof.tokens,
        "difference": proof.difference,
        "change": proof.change,
        "loss": proof.loss,
    }


def _base_of(recipe: Recipe, adapter: Manifest) -> tuple[str, str | None]:
    """Returns path and revision of the base model: the recipe's, since it may have moved; else the adapter's own."""
    if recipe.model is not None:
        return recipe.model.path, recipe.model.revision
    return str(adapter.facts["model"]), adapter.config.get("revision")


def _own_dtype(path: str, revision: str | None, offline: bool) -> str:
    """Returns in what the weights of a model are kept, as recipes name it; fp32 where its config does not say."""
    from mmtune.models.load import load_config

    said = str(load_config(path, revision=revision, offline=offline).dtype).rpartition(".")[2]
    return next((name for name, own in _DTYPES.items() if own == said), "fp32")


def _placed(model: Any) -> Any:
    """Returns a model on the GPU, where there is one."""
    import torch

    return model.to("cuda") if torch.cuda.is_available() else model


def _say(facts: dict[str, Any], target: Path, console: Talk) -> None:
    change = "" if facts["change"] is None else f"; tuning changed it by {facts['change']:.2g}"
    console.say(
        f"export: wrote {target} ({facts['parameters']:,} parameters, {facts['dtype']}). Read back, it is"
        f" {facts['difference']:.2g} nats per answer token off the tuned model, on {facts['tokens']:,} tokens of"
        f" {facts['rows']:,} rows{change}"
    )
