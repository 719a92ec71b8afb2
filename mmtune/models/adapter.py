"""LoRA adapters and full tuning: what trains, and how it is saved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.models.towers import check_towers, linear_names, tower_of

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
    base_path: str = "",
) -> Any:
    """Returns the model wrapped by PEFT, with fresh adapters on the chosen linear layers.

    Raises:
        RecipeError: A tower or target does not exist.
    """
    from peft import LoraConfig, get_peft_model

    check_towers(model, towers)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=dora,
        target_modules=linear_names(model, towers, targets),
        bias="none",
    )
    wrapped = get_peft_model(model, config)
    wrapped.peft_config["default"].base_model_name_or_path = base_path
    return wrapped


def train_fully(model: PreTrainedModel, towers: Sequence[str]) -> PreTrainedModel:
    """Returns the model with exactly the parameters of the chosen towers trainable."""
    check_towers(model, towers)
    chosen = set(towers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(tower_of(name) in chosen)
    return model


def trainable_state(model: Any) -> dict[str, torch.Tensor]:
    """Returns the trainable parameters by name, detached, on the CPU."""
    return {
        name: parameter.detach().cpu().contiguous()
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
            parameter.copy_(state[name])


def save_tuned(model: Any, folder: Path) -> None:
    """Writes a PEFT folder, or the whole model after full tuning; safetensors only."""
    model.save_pretrained(str(folder))
    # PEFT writes a model card with a generated text; ours is the manifest.
    (folder / "README.md").unlink(missing_ok=True)
