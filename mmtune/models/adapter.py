"""LoRA, IA3 and full tuning: what trains, and how it is saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.errors import RecipeError
from mmtune.models.head_apart import MEDIA_IDS
from mmtune.models.save import save_model
from mmtune.models.soft_prompt import BESIDE, lora_beside
from mmtune.models.soft_tokens import save_soft_tokens, soft_tokens
from mmtune.models.spread import is_sharded, own_part, spread_like, whole
from mmtune.models.towers import check_towers, linear_names, tower_of, whole_modules

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def add_lora(
    model: PreTrainedModel,
    *,
    towers: Sequence[str],
    targets: Iterable[str] | None,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    pissa: bool = False,
    base_path: str = "",
) -> Any:
    """Returns the model wrapped by PEFT, with fresh adapters on the chosen linear layers.

    The parts of a fusion are small and often fresh: they train whole, as copies that PEFT saves with the adapters.

    With ``pissa`` the adapters start as the principal components of the weights, which lose
    them (arXiv:2404.02948); ``save_tuned`` writes them as ordinary adapters for the untouched base.

    Raises:
        RecipeError: A tower or target does not exist, or the rank is higher than that of any layer.
    """
    from peft import LoraConfig, get_peft_model

    check_towers(model, towers)
    names = linear_names(model, [tower for tower in towers if tower != "fusion"], targets)
    _check_rank(model, names, r)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=dora,
        init_lora_weights="pissa" if pissa else True,
        target_modules=names,
        modules_to_save=whole_modules(model, "fusion") if "fusion" in towers else None,
        bias="none",
    )
    wrapped = get_peft_model(model, config)
    wrapped.peft_config["default"].base_model_name_or_path = base_path
    if pissa:
        start = {name: tensor.clone() for name, tensor in trainable_state(wrapped).items()}
        wrapped.pissa_start = start  # type: ignore[assignment]
    return wrapped


def _check_rank(model: PreTrainedModel, names: Sequence[str], r: int) -> None:
    """Raises RecipeError where adapters would have a higher rank than every layer that they stand beside."""
    layers: list[Any] = [model.get_submodule(name) for name in names]
    full = max((min(layer.in_features, layer.out_features) for layer in layers), default=r)
    if r > full:
        raise RecipeError(
            f"finetune.lora.r is {r:,}, and no layer that it adapts has a rank above {full:,}",
            "lower finetune.lora.r: 8 to 64 is usual; or set finetune.method: full",
            "rank_too_high",
        )


def add_ia3(model: PreTrainedModel, base_path: str = "") -> Any:
    """Returns the model wrapped by PEFT, with learned factors on keys, values and MLP (IA3, arXiv:2205.05638).

    Raises:
        RecipeError: The language model has none of the known layer names.
    """
    from peft import IA3Config, get_peft_model
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
        TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    )

    kind = model.config.get_text_config().model_type
    wanted = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind, ["k_proj", "v_proj", "down_proj"])
    inner = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind, ["down_proj"])
    targets = linear_names(model, ["llm"], wanted)
    forward = [name for name in targets if name.endswith(tuple(f".{last}" for last in inner))]
    wrapped = get_peft_model(model, IA3Config(target_modules=targets, feedforward_modules=forward))
    wrapped.peft_config["default"].base_model_name_or_path = base_path
    return wrapped


def add_noise_to_embeddings(model: Any, alpha: float, row_tokens: float) -> None:
    """Adds uniform noise to the token embeddings while training (NEFTune, arXiv:2310.05914), in place.

    The paper draws from +-alpha / sqrt(L H) with H the width and L the length of the row. Here L is the mean
    length of all rows: the length of what a batch holds is that of padding and packing, not of a row. Media tokens
    keep theirs: features take their places, which a model finds by these embeddings where it is given no ids.

    Args:
        model: Its token embeddings are noised.
        alpha: Of the paper.
        row_tokens: L.
    """
    import torch

    media = {getattr(model.config, name, None) for name in MEDIA_IDS} - {None}

    def noise(module: torch.nn.Module, given: tuple[torch.Tensor, ...], made_BTH: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return made_BTH
        most = alpha / math.sqrt(row_tokens * made_BTH.shape[-1])
        words_BT = torch.ones_like(given[0], dtype=torch.bool)
        for number in media:
            words_BT &= given[0] != number
        return made_BTH + torch.empty_like(made_BTH).uniform_(-most, most) * words_BT[..., None]

    model.get_input_embeddings().register_forward_hook(noise)


def train_fully(model: PreTrainedModel, towers: Sequence[str]) -> PreTrainedModel:
    """Returns the model with exactly the parameters of the chosen towers trainable."""
    check_towers(model, towers)
    chosen = set(towers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(tower_of(name) in chosen)
    return model


def trainable_state(model: Any) -> dict[str, torch.Tensor]:
    """Returns the trainable parameters by name, detached, whole, on the CPU; all processes must ask."""
    return {
        name: whole(parameter).detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def load_trainable_state(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Copies saved trainable parameters into the model, in place.

    Raises:
        KeyError: The saved names differ from the model's trainable ones.
    """
    import torch

    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if own.keys() != state.keys():
        raise KeyError(sorted(own.keys() ^ state.keys())[0])
    with torch.no_grad():
        for name, parameter in own.items():
            own_part(parameter).copy_(own_part(spread_like(state[name], parameter)))


def whole_state(model: Any) -> dict[str, torch.Tensor] | None:
    """Returns what ``save_tuned`` needs of a model that is spread over processes, all of which must ask; else None."""
    if not is_sharded(model):
        return None
    # A tower that is not in memory is not saved either.
    here = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if not tensor.is_meta}
    return {name: whole(tensor).detach().cpu().contiguous() for name, tensor in here.items()}


def save_tuned(model: Any, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Writes a PEFT folder, or the whole model after full tuning; safetensors only.

    Args:
        model: The tuned model.
        folder: Where to.
        state: Its ``whole_state``.
    """
    soft = soft_tokens(model)
    if soft is not None:
        save_soft_tokens(soft, folder)
        if not hasattr(model, "peft_config"):
            return
    if hasattr(model, "pissa_start"):
        _save_pissa(model, folder)
    else:
        lora = lora_beside(model)
        if lora is not None:
            save_model(lora, folder)
        own = folder if lora is None else folder / BESIDE
        save_model(model, own, **({} if state is None else {"state_dict": state}))
        (own / "README.md").unlink(missing_ok=True)
    # PEFT writes a model card with a generated text; ours is the manifest.
    (folder / "README.md").unlink(missing_ok=True)


def _save_pissa(model: Any, folder: Path) -> None:
    """Writes the change since the start as an adapter of twice the rank, by PEFT's own conversion."""
    from tempfile import TemporaryDirectory

    config = model.peft_config["default"]
    with TemporaryDirectory() as start:
        # The conversion reads the start from a folder whose config asks for no decomposition.
        config.init_lora_weights = True
        save_model(model, Path(start), state_dict=model.pissa_start)
        config.init_lora_weights = "pissa"
        save_model(model, folder, path_initial_model_for_weight_conversion=start)
