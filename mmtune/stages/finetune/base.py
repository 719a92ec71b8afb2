"""The model that a run trains: its base, what trains of it, and its place on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mmtune.errors import CapabilityError, RecipeError
from mmtune.recipe import Finetune, Recipe
from mmtune.stages.finetune.virtual import start_of
from mmtune.talk import Talk


def weights_dtype(settings: Finetune, precision: str) -> Any:
    """Returns the type of the base's weights: a frozen one may rest in bf16, one that trains itself stays in fp32."""
    import torch

    small = precision == "bf16" and settings.method != "full"
    # DeepSpeed's ZeRO-3 keeps what trains in the precision of what does not.
    deep = settings.engine == "deepspeed" and settings.shard == "zero3"
    return torch.bfloat16 if small and not deep else torch.float32


def load_base(
    recipe: Recipe,
    settings: Finetune,
    path: str,
    precision: str,
    offline: bool,
    leave_out: Any = None,
    *,
    whole: bool = False,
) -> Any:
    """Returns the base model, less the weights that ``leave_out`` names; ``whole`` quantizes nothing."""
    from mmtune.models.load import load_model

    return load_model(
        path,
        revision=recipe.model.revision if recipe.model else None,
        dtype=weights_dtype(settings, precision),
        attn=recipe.model.attn if recipe.model else "auto",
        offline=offline,
        random_weights=settings.from_scratch,
        nf4=settings.quantize == "nf4" and not whole,
        leave_out=leave_out,
    )


def model_to_train(
    recipe: Recipe,
    settings: Finetune,
    path: str,
    absent: Sequence[str],
    load: Callable[..., Any],
    tokenizer: Any,
    soft: int,
    row_tokens: float,
    console: Talk,
) -> Any:
    """Returns the model with what trains, without the towers of the media in ``absent``.

    Rows have ``soft`` tokens of their own, and are ``row_tokens`` long in the mean.
    """
    import torch

    from mmtune.models.left_out import set_aside, tower_weights
    from mmtune.models.method import with_method
    from mmtune.models.unused_layers import skip_unused_layers

    if soft and (settings.shard != "none" or settings.offload):
        raise RecipeError(
            "the templates have soft tokens, which do not go with finetune.shard and offload",
            "leave out shard and offload",
        )
    torch.manual_seed(recipe.seed)
    behind = "projector" not in settings.train
    model: Any = load(partial(tower_weights, kinds=absent, with_projector=behind) if absent else None)
    skip_unused_layers(model)
    _set_course(model, settings, row_tokens, console)
    prompt = None if settings.soft_prompt is None else start_of(settings.soft_prompt, tokenizer, recipe.run_dir)
    with set_aside(model):
        return with_method(
            model,
            settings.method,
            towers=settings.train,
            lora=_lora(settings),
            virtual_tokens=settings.virtual_tokens,
            base_path=path,
            soft_prompt=prompt,
            soft_tokens=soft,
        )


def _set_course(model: Any, settings: Finetune, row_tokens: float, console: Talk) -> None:
    """Gives a model what holds while it trains alone: kernels, noise on its embeddings, and forgotten activations."""
    from mmtune.models.adapter import add_noise_to_embeddings
    from mmtune.models.liger import use_liger

    try:
        if settings.liger == "auto" and use_liger(model):
            console.say("finetune: Liger's kernels are in use")
    except CapabilityError as error:
        console.note(f"{error.message}; the model trains with its own operations")
    if settings.neftune_alpha:
        add_noise_to_embeddings(model, settings.neftune_alpha, row_tokens)
    if settings.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()


def _lora(settings: Finetune) -> dict[str, Any]:
    """Returns LoRA's settings as ``models.method`` names them."""
    own = settings.lora.model_dump(exclude={"init", "plus_ratio"})
    targets = None if own["targets"] == "all-linear" else own["targets"]
    return {**own, "targets": targets, "pissa": settings.lora.init == "pissa"}


def place(model: Any, settings: Finetune, accelerator: Any, console: Talk) -> None:
    """Moves the model to this process's device, whole or its part, the same weights everywhere."""
    from mmtune.training.ranks import share_weights, world_size

    by_fsdp = settings.engine == "fsdp2" and (settings.offload or (settings.shard != "none" and world_size() > 1))
    if by_fsdp:
        from mmtune.training.sharding import shard_language_model

        if "llm" not in settings.train:
            # Every process then goes through the same layers backward, also one without a picture.
            model.enable_input_require_grads()
        shard_language_model(
            model, accelerator.device, keep_gathered=settings.shard == "zero2", offload=settings.offload
        )
        return
    if settings.shard != "none" and world_size() == 1:
        console.note("finetune.shard does nothing with one process")
    model.to(accelerator.device)
    share_weights(model)


def show_towers(model: Any, console: Talk) -> None:
    """Prints what trains of every tower that the model holds, and says so where what fuses them does not.

    Raises:
        RecipeError: A tower that trains is behind gates that are shut and stay so.
    """
    from mmtune.models.towers import shown_towers, shut_gates, tower_table

    table = tower_table(model)
    console.table(*shown_towers(table))
    behind = [row.tower for row in table if row.trainable and row.tower not in ("llm", "fusion")]
    if behind and (shut := shut_gates(model)):
        raise RecipeError(
            f"finetune.train names {', '.join(behind)}, whose media reach no answer: {shut[0]} and the other gates of"
            " fusion.attention are 0 and do not train",
            "add fusion to finetune.train, or take a base whose fusion was trained (mmtune pretrain)",
            "shut_gates",
        )
    if any(row.tower == "fusion" and row.state == "frozen" for row in table):
        console.note("what fuses the towers stays as it is; add fusion to finetune.train to train it")
