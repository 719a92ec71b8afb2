"""A model folder or hub id to a transformers model, and an adapter folder onto it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.errors import CapabilityError, DataError, IntegrityError, RecipeError
from mmtune.hub import look_here_without_hub
from mmtune.models.attention import FLEX

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

# A config.json that names any of these wants code of its own to run.
_CODE_KEYS = ("auto_map", "_attn_implementation_internal", "kernel_config")
_TAKEN_BY = {
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flash_attention_3": "_supports_flash_attn",
}
"""What a class of transformers says of a kernel."""


def load_config(path: str, *, revision: str | None = None, offline: bool = False) -> PretrainedConfig:
    """Returns the model's config, refusing one that wants to run code of its own.

    Raises:
        DataError: The config asks for remote code.
        CapabilityError: A hub model is not at hand.
        RecipeError: There is no such folder, or no config in it.
    """
    from transformers import AutoConfig

    from mmtune.models.composite import register

    register()
    folder = Path(path)
    if folder.is_dir():
        file = folder / "config.json"
        if not file.is_file():
            raise RecipeError(f"{folder} has no config.json", "set model.path to a model folder or a hub id")
        try:
            values = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise IntegrityError(f"{file} is not valid JSON", "fetch the model again") from error
        asked = [key for key in _CODE_KEYS if values.get(key)]
        if asked:
            raise DataError(
                f"{file} asks to run code of its own ({', '.join(asked)})",
                "use a model whose classes are part of transformers",
                "remote_code_refused",
            )
    elif path.startswith((".", "/", "~")):
        raise RecipeError(
            f"the model folder {path} is not there",
            "check its path in the recipe: a relative one is relative to the recipe's folder",
            "model_missing",
        )
    look_here_without_hub(path, offline)
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False, local_files_only=offline)
    except (OSError, ValueError) as error:
        raise _not_at_hand(path, error) from error


def _not_at_hand(path: str, error: Exception) -> CapabilityError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CapabilityError(
        f"the model {path!r} cannot be loaded: {first}",
        "check the name and the network; a folder beside the recipe is written ./FOLDER",
        "model_unavailable",
    )


def model_class(config: PretrainedConfig) -> Any:
    """Returns the transformers class that the config names, or the fitting Auto class."""
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None and hasattr(found, "generate"):
            return found
    for auto in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM"):
        cls = getattr(transformers, auto, None)
        if cls is not None and type(config) in cls._model_mapping:
            return cls._model_mapping[type(config)]
    raise CapabilityError(
        f"no generating model class is known for the model type {config.model_type!r}",
        "upgrade transformers, or choose another model",
        "model_unsupported",
    )


def load_model(
    path: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    attn: str = "auto",
    offline: bool = False,
    random_weights: bool = False,
    nf4: bool = False,
    leave_out: Callable[[nn.Module], Collection[str]] | None = None,
) -> PreTrainedModel:
    """Returns the model in evaluation mode, on the CPU.

    Args:
        path: Folder or hub id.
        revision: Branch, tag or commit of a hub model.
        dtype: Type of the weights; None keeps fp32.
        attn: ``auto`` or the name of an attention kernel; FlexAttention comes later, for packed trees alone.
        offline: Never reach for the network.
        random_weights: Build from the config alone (a baseline).
        nf4: Hold the language model's linear layers in 4 bits.
        leave_out: A model to the names of the weights that are not read; they stand as meta tensors.

    Raises:
        DataError: Only pickled weights are there, or remote code is asked for.
        CapabilityError: The model is not at hand, its class is unknown, or the kernel is not for it or not installed.
        IntegrityError: Weights are missing, damaged or of another shape.
    """
    import torch
    from transformers.utils import logging

    from mmtune.models.left_out import built_without, finish

    # The stage shows its own progress.
    logging.disable_progress_bar()
    config = load_config(path, revision=revision, offline=offline)
    cls = model_class(config)
    if attn not in ("auto", FLEX):
        _set_kernel(config, attn)
        _check_kernel(cls, config, attn)
    if random_weights:
        return cls(config).to(dtype or torch.float32).eval()
    _check_weights(Path(path))
    given = {"config": config, "revision": revision, "dtype": dtype or torch.float32, "local_files_only": offline}
    if nf4:
        from mmtune.models.quantize import keep_layout, nf4_config

        given["quantization_config"] = nf4_config(cls, config, dtype or torch.float32)
    model = _with_weights(built_without(cls, leave_out) if leave_out else cls, path, given)
    if leave_out:
        finish(model, cls)
    if nf4:
        keep_layout(model)
    return model.eval()


def _with_weights(cls: Any, path: str, given: dict[str, Any]) -> PreTrainedModel:
    """Returns a model of a class with all its weights; ``given`` goes to ``from_pretrained``.

    Raises:
        CapabilityError: They are not at hand.
        IntegrityError: Some are missing, damaged or of another shape.
    """
    from safetensors import SafetensorError

    try:
        model, info = cls.from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **given
        )
    except OSError as error:
        raise _not_at_hand(path, error) from error
    except SafetensorError as error:
        raise IntegrityError(
            f"the weights of {path} are cut or damaged: {str(error).splitlines()[0]}",
            "fetch the model again",
            "damaged_weights",
        ) from error
    except (RuntimeError, ValueError) as error:
        raise IntegrityError(
            f"the weights of {path} do not fit its config: {str(error).splitlines()[0]}", "fetch the model again"
        ) from error
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise IntegrityError(
            f"{path} lacks {len(missing)} weights, such as {missing[0]}", "fetch the model again", "missing_weights"
        )
    return model


def _check_weights(folder: Path) -> None:
    """Refuses a model folder without safetensors."""
    if not folder.is_dir() or list(folder.glob("*.safetensors")):
        return
    pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    reason = "only pickled weights, which can run code" if pickled else "no weights"
    raise DataError(
        f"{folder} holds {reason}", "convert them to safetensors", "pickle_refused" if pickled else "no_weights"
    )


def _set_kernel(config: PretrainedConfig, attn: str) -> None:
    """Sets the attention kernel of a model and of those of its towers whose class takes it; others keep their own."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    config._attn_implementation, text = attn, config.get_text_config()
    for name in config.sub_configs:
        tower = getattr(config, name, None)
        cls = None if tower is None or tower is text else MODEL_MAPPING.get(type(tower), None)
        if tower is not None and cls is not None and not getattr(cls, _TAKEN_BY.get(attn, ""), True):
            tower._attn_implementation = None


def _check_kernel(cls: Any, config: PretrainedConfig, attn: str) -> None:
    """Builds the model without memory, where transformers looks for the kernel and asks the family."""
    import torch

    try:
        with torch.device("meta"):
            cls(config)
    except (ImportError, ValueError) as error:
        raise CapabilityError(
            f"the attention kernel {attn} cannot run {cls.__name__}: {str(error).splitlines()[0]}",
            "set model.attn: auto",
            "no_attention_kernel",
        ) from error


def load_tuned(base: str, folder: Path, **settings: Any) -> Any:
    """Returns the tuned model: the base with its adapter, or the folder's own full weights.

    Args:
        base: Folder or hub id of the base model.
        folder: ``adapter/``: a PEFT folder, soft tokens, or a whole model after full tuning.
        settings: Passed on to ``load_model``.

    Raises:
        IntegrityError: The adapter's weights do not fit the base.
    """
    from mmtune.models.soft_tokens import FILE, load_soft_tokens

    soft = (folder / FILE).is_file()
    if not (folder / "adapter_config.json").is_file():
        if soft:
            return load_soft_tokens(load_model(base, **settings), folder)
        return load_model(str(folder), **{**settings, "revision": None})
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    from mmtune.models.soft_prompt import BESIDE, join_lora, logits_of_own_tokens

    model = load_model(base, **settings)
    if soft:
        load_soft_tokens(model, folder)
    try:
        tuned = PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError, KeyError) as error:
        raise IntegrityError(f"{folder} does not fit {base}: {str(error).splitlines()[0]}", "tune it again") from error
    # PEFT looks into the base's config where it lists its weights, and the base may have moved.
    tuned.peft_config["default"].base_model_name_or_path = base
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        stored = set(file.keys())
    unexpected = sorted(stored - set(get_peft_model_state_dict(tuned)))
    if unexpected:
        raise IntegrityError(
            f"{folder} has {len(unexpected)} weights with no place in {base}, such as {unexpected[0]}",
            "tune again from this base",
            "adapter_mismatch",
        )
    if (folder / BESIDE).is_dir():
        prompted = PeftModel.from_pretrained(tuned.get_base_model(), str(folder / BESIDE))
        tuned = join_lora(prompted, tuned)
    return logits_of_own_tokens(tuned).eval()


def load_to_answer(
    base: str,
    adapter: Path | None,
    *,
    precision: str = "auto",
    revision: str | None = None,
    attn: str = "auto",
    offline: bool = False,
    nf4: bool = False,
) -> Any:
    """Returns the base, or the tuned model, on the device where it answers.

    Args:
        base: Folder or hub id.
        adapter: ``adapter/`` of the tuned model; None for the base itself.
        precision: ``auto`` takes bf16 where the GPU has it; bf16; anything else is fp32.
        revision: Branch, tag or commit of a hub model.
        attn: As in ``load_model``.
        offline: Never reach for the network.
        nf4: As in ``load_model``.
    """
    import torch

    from mmtune.models.linear import fuse_linears

    on_gpu = torch.cuda.is_available()
    bf16 = precision == "bf16" or (precision == "auto" and on_gpu and torch.cuda.is_bf16_supported())
    settings: dict[str, Any] = {"revision": revision, "attn": attn, "offline": offline, "nf4": nf4}
    settings["dtype"] = torch.bfloat16 if bf16 else torch.float32
    model: Any = load_model(base, **settings) if adapter is None else load_tuned(base, adapter, **settings)
    if on_gpu:
        return model.to("cuda")
    fuse_linears(model)
    return model
