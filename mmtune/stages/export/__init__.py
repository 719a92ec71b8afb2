"""export: base and adapter/ to exported/, one model folder that transformers loads and servers serve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmtune.errors import IntegrityError, ResourceError
from mmtune.models.digest import weights_digest
from mmtune.recipe import Recipe
from mmtune.recipe.export import Export
from mmtune.storage import Manifest, Staging, foresee, open_stage, read_manifest
from mmtune.talk import Talk

__all__ = ["export"]
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def export(
    recipe: Recipe, *, force: bool = False, dry_run: bool = False, offline: bool = False, console: Talk
) -> dict[str, Any]:
    """Merges the adapter into the weights, writes them with config and processor, reads them back and compares.

    Returns the result document.

    Raises:
        DataError: adapter/ or tokens/ is missing, or a medium of theirs cannot be read.
        RecipeError: What was tuned are virtual tokens.
        ResourceError: The GPU's memory does not hold the model.
        IntegrityError: The base or tokens/ are another one's by now, or the exported model answers otherwise than the
            tuned one.
    """
    settings, folder = recipe.export or Export(), recipe.run_dir / "adapter"
    adapter = read_manifest(folder, made_by="finetune")
    tokens = read_manifest(recipe.run_dir / "tokens", made_by="tokenize")
    path, revision = str(adapter.facts["model"]), adapter.config.get("revision")
    _check_model(recipe, tokens, path)
    config = {
        "export": settings.model_dump(mode="json"),
        "model": path,
        "revision": revision,
        "weights": weights_digest(path, revision=revision, offline=offline),
    }
    if config["weights"] != adapter.config.get("weights"):
        raise IntegrityError(
            f"the model {path} is another one than adapter/ was tuned from",
            "bring that one back, or run: mmtune finetune --force",
            "other_model",
        )
    parents = {"adapter": adapter.hash, "tokens": tokens.hash}
    target = recipe.run_dir / "exported"
    if dry_run:
        _check_method(folder, adapter)
        console.say(foresee(target, stage="export", config=config, parents=parents, force=force))
        return {"stage": "export", "dry_run": True, "target": str(target), "config": config}
    staging = open_stage(target, stage="export", config=config, parents=parents, force=force, say=console.say)
    if staging is None:
        return {"stage": "export", "cached": True, "target": str(target), **read_manifest(target).facts}
    with staging, _in_memory():
        facts = _write(recipe, settings, adapter, tokens, staging, offline, console)
        staging.publish(facts=facts)
    _say(facts, target, console)
    return {"stage": "export", "cached": False, "target": str(target), **facts}


def _check_model(recipe: Recipe, tokens: Manifest, path: str) -> None:
    """Raises IntegrityError where the recipe or tokens/ are of another model than adapter/ was tuned from."""
    asked, made_for = recipe.model.path if recipe.model else path, str(tokens.facts.get("model") or path)
    if asked != path:
        raise IntegrityError(
            f"adapter/ was tuned from {path}, the recipe asks for {asked}",
            "run: mmtune finetune --force",
            "other_model",
        )
    if made_for != path:
        raise IntegrityError(
            f"tokens/ was made for the model {made_for}, adapter/ was tuned from {path}",
            "run: mmtune tokenize",
            "other_model",
        )


def _check_method(folder: Path, adapter: Manifest) -> None:
    # Imported here: exported/ that is up to date is found without torch.
    from mmtune.models.merged import check_mergeable

    check_mergeable(folder, str(adapter.facts.get("method", "")))


@contextmanager
def _in_memory() -> Iterator[None]:
    """Says what to do where the GPU's memory runs out within this context."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            "the GPU's memory does not hold the model in fp32, in which both are compared",
            "export on the CPU, with the GPU hidden: CUDA_VISIBLE_DEVICES= mmtune export",
            "no_gpu_memory",
        ) from error


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
    from mmtune.models.merged import kept_in, merged
    from mmtune.models.save import save_model
    from mmtune.stages.export.proof import batches_of, losses_of, losses_without_adapters, prove

    folder = recipe.run_dir / "adapter"
    _check_method(folder, adapter)
    # As it was tuned with: limits of pictures and the chat template among it.
    processor = load_processor(str(folder), offline=offline)
    split, root = next(iter(tokens.rows)), Path(tokens.facts["media_root"])
    rows, batches = batches_of(recipe.run_dir / "tokens", split, settings.rows, processor, root)
    path, revision = str(adapter.facts["model"]), adapter.config.get("revision")
    attn = _kernel(recipe)
    model: Any = _placed(load_tuned(path, folder, revision=revision, attn=attn, offline=offline))
    tuned_N, base_N = losses_of(model, batches), losses_without_adapters(model, batches)
    dtype = settings.dtype if settings.dtype != "auto" else _own_dtype(path, revision, offline)
    if adapter.config["finetune"].get("quantize") == "nf4":
        console.note(
            "adapter/ was tuned on 4-bit weights and is merged into the full ones: eval scores it on the former"
        )
    model = kept_in(merged(model), getattr(torch, _DTYPES[dtype]))
    # All that tells a server where an answer ends.
    model.generation_config.eos_token_id = adapter.facts["eos_token_ids"]
    save_model(model, staging.path)
    processor.save_pretrained(str(staging.path))
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


def _kernel(recipe: Recipe) -> str:
    """Returns the attention kernel that the recipe asks for, less FlashAttention, which does not compute in fp32."""
    asked = recipe.model.attn if recipe.model else "auto"
    return "auto" if asked.startswith("flash") else asked


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
