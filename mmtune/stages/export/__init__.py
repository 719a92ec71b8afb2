"""export: base and adapter/ to exported/, one model folder that transformers loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.errors import IntegrityError, RecipeError, ResourceError
from mmtune.models.tuned_from import Base, base_of
from mmtune.recipe import Recipe
from mmtune.recipe.export import Export
from mmtune.storage import (
    Manifest,
    Staging,
    foresee,
    is_finished,
    open_stage,
    read_manifest,
    verify_files,
    verify_parents,
)
from mmtune.talk import Talk

if TYPE_CHECKING:
    from mmtune.stages.export.proof import ProofRows

__all__ = ["check_export", "export"]
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def check_export(recipe: Recipe) -> None:
    """Refuses a recipe whose export could not end well whatever is trained, before anything is.

    Raises:
        RecipeError: It tunes nothing, and adapter/ is not there.
    """
    if recipe.finetune is None and not is_finished(recipe.run_dir / "adapter"):
        raise RecipeError(
            f"there is nothing to export: the recipe has no `finetune`, and {recipe.run_dir / 'adapter'} is not there",
            "add `finetune`, or leave `export` out",
            "no_adapter",
        )


def export(
    recipe: Recipe, *, force: bool = False, dry_run: bool = False, offline: bool = False, console: Talk
) -> dict[str, Any]:
    """Merges the adapter into the weights, writes them with config and processor, reads them back and compares.

    Returns the result document.

    Raises:
        DataError: adapter/ or tokens/ is missing, or a medium of the rows that are compared cannot be read.
        RecipeError: What was tuned are virtual tokens.
        ResourceError: The GPU's memory does not hold the model.
        IntegrityError: The base or tokens/ are another one's by now, or the exported model answers otherwise than the
            tuned one.
    """
    settings, folder = recipe.export or Export(), recipe.run_dir / "adapter"
    adapter = read_manifest(folder, made_by="finetune")
    tokens = read_manifest(recipe.run_dir / "tokens", made_by="tokenize")
    base = base_of(adapter.config, recipe.named_model, offline=offline)
    _check_tokens(tokens, adapter, base, console)
    config = {
        "export": settings.model_dump(mode="json"),
        "model": base.path,
        "revision": base.revision,
        "weights": base.weights,
    }
    parents = {"adapter": adapter.hash, "tokens": tokens.hash}
    target = recipe.run_dir / "exported"
    if dry_run:
        _check_method(folder, adapter)

        def check() -> None:
            verify_parents(target, parents)
            _rows(recipe, settings, tokens, offline)

        console.say(foresee(target, stage="export", config=config, parents=parents, force=force, check=check))
        return {"stage": "export", "dry_run": True, "target": str(target), "config": config}
    staging = open_stage(target, stage="export", config=config, parents=parents, force=force, say=console.say)
    if staging is None:
        found = read_manifest(target)
        # What is handed on to servers is read once more: nothing after it would find a damaged byte.
        verify_files(target, found)
        return {"stage": "export", "cached": True, "target": str(target), **found.facts}
    with staging, _in_memory():
        facts = _write(recipe, settings, base, adapter, tokens, staging, offline, console)
        staging.publish(facts=facts)
    _say(facts, target, console)
    return {"stage": "export", "cached": False, "target": str(target), **facts}


def _check_tokens(tokens: Manifest, adapter: Manifest, base: Base, console: Talk) -> None:
    """Says where tokens/ is seen to hold other rows than adapter/ learned from.

    Raises:
        IntegrityError: It was made for another model.
    """
    made_for, tuned_from = str(tokens.facts.get("model") or ""), str(adapter.config["model"])
    if made_for not in (tuned_from, base.path):
        raise IntegrityError(
            f"tokens/ was made for the model {made_for}, adapter/ was tuned from {tuned_from}",
            "run: mmtune tokenize",
            "other_model",
        )
    if adapter.parents.get("tokens") != tokens.hash:
        console.note("tokens/ was made again since adapter/ was tuned: the exported model is compared on other rows")


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
    base: Base,
    adapter: Manifest,
    tokens: Manifest,
    staging: Staging,
    offline: bool,
    console: Talk,
) -> dict[str, Any]:
    """Fills the folder and returns what the manifest says of it."""
    import torch

    from mmtune.models.load import load_to_answer
    from mmtune.models.merged import kept_in, merged
    from mmtune.models.save import save_model
    from mmtune.stages.export.proof import losses_of, prove

    folder = recipe.run_dir / "adapter"
    _check_method(folder, adapter)
    processor, rows = _rows(recipe, settings, tokens, offline)
    model, tuned_N, base_N = _tuned(recipe, base, adapter, rows, offline)
    dtype = settings.dtype if settings.dtype != "auto" else _own_dtype(base.path, base.revision, offline)
    model = kept_in(merged(model), getattr(torch, _DTYPES[dtype]))
    # All that tells a server where an answer ends.
    model.generation_config.eos_token_id = adapter.facts["eos_token_ids"]
    save_model(model, staging.path)
    processor.save_pretrained(str(staging.path))
    _note(str(model.config.model_type), adapter, console)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    del model
    # In fp32 again: what differs is what the written weights lost, not how a processor computes with fewer bits.
    exported = load_to_answer(str(staging.path), None, precision="fp32", attn=_kernel(recipe), offline=True)
    proof = prove(rows.count, tuned_N, base_N, losses_of(exported, rows), dtype)
    about = {"model": base.path, "method": adapter.facts["method"], "parameters": parameters}
    return {**about, "dtype": dtype, **asdict(proof)}


def _rows(recipe: Recipe, settings: Export, tokens: Manifest, offline: bool) -> tuple[Any, ProofRows]:
    """Returns the tuned model's processor and the rows that it is compared on, whose media are there."""
    from mmtune.encoding.processor import load_processor
    from mmtune.stages.export.proof import rows_of

    # As it was tuned with: limits of pictures and the chat template among it.
    processor = load_processor(str(recipe.run_dir / "adapter"), offline=offline)
    split, root = next(iter(tokens.rows)), Path(tokens.facts["media_root"])
    rows = rows_of(recipe.run_dir / "tokens", split, settings.rows, processor, root)
    rows.check_media()
    return processor, rows


def _tuned(recipe: Recipe, base: Base, adapter: Manifest, rows: ProofRows, offline: bool) -> tuple[Any, Any, Any]:
    """Returns the tuned model, what it loses by every answer token, and what its base does: None if that was random."""
    from mmtune.models.load import load_to_answer
    from mmtune.stages.export.proof import losses_of, losses_without_adapters

    given: dict[str, Any] = {"precision": "fp32", "revision": base.revision, "attn": _kernel(recipe)}
    given["offline"] = offline
    whole, base_N = adapter.facts["method"] == "full", None
    if whole and not adapter.config["finetune"].get("from_scratch"):
        # One after the other: both at once would take twice the memory.
        base_N = losses_of(load_to_answer(base.path, None, **given), rows)
    model = load_to_answer(base.path, recipe.run_dir / "adapter", **given)
    return model, losses_of(model, rows), base_N if whole else losses_without_adapters(model, rows)


def _note(kind: str, adapter: Manifest, console: Talk) -> None:
    """Says what a person should know of a model of a kind before it is served."""
    if adapter.config["finetune"].get("quantize") == "nf4":
        console.note(
            "adapter/ was tuned on 4-bit weights and is merged into the full ones: eval scores it on the former"
        )
    if kind.startswith("mmtune_"):
        console.note(
            f"transformers does not know {kind} by itself: where exported/ is loaded, call"
            " mmtune.models.composite.register() first; a server without mmtune cannot serve it"
        )


def _kernel(recipe: Recipe) -> str:
    """Returns the attention kernel that the recipe asks for, less FlashAttention, which does not compute in fp32."""
    asked = recipe.model.attn if recipe.model else "auto"
    return "auto" if asked.startswith("flash") else asked


def _own_dtype(path: str, revision: str | None, offline: bool) -> str:
    """Returns in what the weights of a model are kept, as recipes name it; fp32 where its config does not say."""
    from mmtune.models.load import load_config

    said = str(load_config(path, revision=revision, offline=offline).dtype).rpartition(".")[2]
    return next((name for name, own in _DTYPES.items() if own == said), "fp32")


def _say(facts: dict[str, Any], target: Path, console: Talk) -> None:
    change = "" if facts["change"] is None else f", where tuning changed it by {facts['change']:.2g}"
    console.say(
        f"export: wrote {target} ({facts['parameters']:,} parameters, {facts['dtype']}). Read back, it gives the"
        f" {facts['tokens']:,} answer tokens of {facts['rows']:,} rows the loss of the tuned model to"
        f" {facts['difference']:.2g} nats{change}"
    )
