"""Prompt tuning, P-tuning and prefix tuning on the language model, by PEFT.

Prompt tuning (arXiv:2104.08691) and P-tuning (arXiv:2103.10385) put learned vectors before
the first token; prefix tuning (arXiv:2101.00190) puts learned keys and values into every layer.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmtune.errors import CapabilityError
from mmtune.models.soft_tokens import labels_first

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

METHODS = ("prompt", "p_tuning", "prefix")
BESIDE = "soft_prompt"
"""Folder within a LoRA adapter that holds the soft prompt which was trained with it."""


def add_soft_prompt(
    model: PreTrainedModel,
    method: str,
    *,
    virtual_tokens: int,
    init: str = "random",
    text_ids: Sequence[int] = (),
    label_ids: Sequence[Sequence[int]] = (),
    encoder: str = "mlp",
    base_path: str = "",
) -> Any:
    """Returns the model wrapped by PEFT, with fresh virtual tokens and everything else frozen.

    Args:
        model: The base model.
        method: One of ``METHODS``.
        virtual_tokens: How many vectors are learned; those of a text are as many as its tokens.
        init: ``random``; ``vocabulary`` starts ``prompt`` with the embeddings of tokens drawn, ``labels`` with those of
            labels before them; ``text`` starts ``prompt`` and ``prefix`` as if the text stood typed before every row.
        text_ids: Tokens of that text.
        label_ids: Tokens of every label.
        encoder: Of ``p_tuning``: ``mlp`` or ``lstm``.
        base_path: Recorded in the adapter.

    Raises:
        CapabilityError: The family gives tokens positions or blocks that virtual tokens would shift.
    """
    import peft

    reason = _shifted(model)
    if reason:
        raise CapabilityError(
            f"finetune.method {method} does not fit {type(model).__name__}: {reason}",
            "use method lora or ia3",
            "method_unsupported",
        )
    kinds: dict[str, Any] = {
        "prompt": peft.PromptTuningConfig,
        "p_tuning": peft.PromptEncoderConfig,
        "prefix": peft.PrefixTuningConfig,
    }
    count = len(text_ids) if init == "text" else virtual_tokens
    more = {"encoder_reparameterization_type": encoder.upper()} if method == "p_tuning" else {}
    config = kinds[method](task_type="CAUSAL_LM", num_virtual_tokens=count, **more)
    start = None if init == "random" else _start(model, method, count, text_ids, label_ids)
    wrapped = peft.get_peft_model(model, config)
    if start is not None:
        weight = wrapped.prompt_encoder["default"].embedding.weight
        weight.data.copy_(start.reshape(weight.shape))
    wrapped.peft_config["default"].base_model_name_or_path = base_path
    return logits_of_own_tokens(wrapped)


def _start(
    model: Any, method: str, count: int, text_ids: Sequence[int], label_ids: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Returns what virtual tokens start as: embeddings ``(V, H)``, or keys and values ``(V, layers, 2, heads, width)``.

    Args:
        model: The base model, on the CPU.
        method: ``prompt`` or ``prefix``.
        count: V.
        text_ids: ``(V,)`` tokens to start from; drawn from the vocabulary where there are none.
        label_ids: Tokens of labels, whose mean stands first in place of tokens drawn.
    """
    import torch

    embed = model.get_input_embeddings()
    drawn = torch.randint(0, embed.num_embeddings, (count,))
    ids = torch.tensor(list(text_ids)) if text_ids else drawn
    with torch.no_grad():
        if method == "prompt":
            return labels_first(embed, embed(ids), label_ids).float()
        training = model.training
        made = model.eval()(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], use_cache=True)
        model.train(training)
    layers = [torch.stack((layer.keys[0], layer.values[0])) for layer in made.past_key_values.layers]
    return torch.stack(layers).permute(3, 0, 1, 2, 4).float()


def add_beside(adapted: Any, **settings: Any) -> Any:
    """Returns a model whose LoRA adapters and virtual tokens train together; each is saved as an adapter of its own.

    Args:
        adapted: The model that ``add_lora`` returned.
        settings: Of ``add_soft_prompt``, for method ``prompt``.

    Raises:
        CapabilityError: As ``add_soft_prompt`` does.
    """
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    with warnings.catch_warnings():
        # PEFT takes a second adapter for a mistake.
        warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT for a second time")
        wrapped = add_soft_prompt(adapted.get_base_model(), "prompt", **settings)
    for parameter in trained:
        parameter.requires_grad_(True)
    return join_lora(wrapped, adapted)


def join_lora(wrapped: Any, adapted: Any) -> Any:
    """Returns a model with a soft prompt that knows the LoRA model around the same base, to be saved with it."""
    # In a list, or its parameters would go by two names.
    wrapped.lora_beside = [adapted]
    return wrapped


def lora_beside(model: Any) -> Any | None:
    """Returns the LoRA model around the base of a model with a soft prompt, or None."""
    return next(iter(vars(model).get("lora_beside", ())), None)


def _shifted(model: PreTrainedModel) -> str:
    """Says what PEFT would silently drop, or nothing."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if "mrope_section" in rope:
        return "its 3-D positions of images are lost behind virtual tokens"
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        return "its attention within an image is lost behind virtual tokens"
    return ""


def logits_of_own_tokens(model: Any) -> Any:
    """Makes a direct call give logits for the given tokens only, not for the virtual ones before them.

    Generation calls the inner model and is left alone. Returns the same model.
    """
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning or config.peft_type.value == "PREFIX_TUNING":
        return model
    count = config.num_virtual_tokens
    direct: list[bool] = []

    def cut(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        return (given[0][:, count:], *given[1:]) if direct else None

    model.register_forward_pre_hook(lambda *_: direct.append(True))
    model.register_forward_hook(lambda *_: direct.clear(), always_call=True)
    model.get_base_model().get_output_embeddings().register_forward_pre_hook(cut)
    return model


def virtual_tokens(model: Any) -> int:
    """Returns how many virtual tokens stand before every row: 0 without a soft prompt."""
    config = getattr(model, "active_peft_config", None)
    return int(config.num_virtual_tokens) if config is not None and config.is_prompt_learning else 0


def is_prefix(model: Any) -> bool:
    """Says whether the virtual tokens are keys and values alone, so that they ask for nothing themselves."""
    return virtual_tokens(model) > 0 and model.active_peft_config.peft_type.value == "PREFIX_TUNING"


def run_behind_virtual_tokens(model: Any, inputs: Mapping[str, Any]) -> Any:
    """Returns what the base model makes of rows behind the virtual tokens.

    PEFT's own forward knows neither a 4-D mask nor positions, which packed trees have.

    Args:
        model: The model with a soft prompt of V virtual tokens.
        inputs: ``input_ids`` and ``position_ids`` ``(B, T)`` without them, ``attention_mask`` with them:
            ``(B, 1, V + T, V + T)``, or ``(B, 1, T, V + T)`` where ``is_prefix``; media.
    """
    import torch

    base, count, given = model.get_base_model(), virtual_tokens(model), dict(inputs)
    rows = given["input_ids"].shape[0]
    positions_BT = given.pop("position_ids") + count
    if is_prefix(model):
        return base(**given, position_ids=positions_BT, past_key_values=model.get_prompt(rows), use_cache=False)
    tokens_BTH = model.word_embeddings(given.pop("input_ids"))
    virtual_BVH = model.get_prompt(batch_size=rows).to(tokens_BTH.dtype)
    first_BV = torch.arange(count, device=positions_BT.device).expand(rows, -1)
    return base(
        inputs_embeds=torch.cat((virtual_BVH, tokens_BTH), dim=1),
        position_ids=torch.cat((first_BV, positions_BT), dim=1),
        **given,
        use_cache=False,
    )


def word_vectors(model: Any) -> torch.Tensor:
    """Returns ``(W, H)`` the word embeddings of a model, detached, on the CPU, in fp32."""
    return model.get_input_embeddings().weight.detach().float().cpu()


def set_virtual_tokens(model: Any, vectors_VH: torch.Tensor) -> None:
    """Puts given vectors in the place of the virtual tokens of a model of method ``prompt``, in place.

    Args:
        model: What ``add_soft_prompt`` returned.
        vectors_VH: As many vectors as it has virtual tokens.

    Raises:
        ValueError: The shape is another.
    """
    import torch

    weight_VH = model.prompt_encoder[model.active_adapter].embedding.weight
    if vectors_VH.shape != weight_VH.shape:
        raise ValueError(f"{tuple(vectors_VH.shape)} virtual tokens, not {tuple(weight_VH.shape)}")
    with torch.no_grad():
        weight_VH.copy_(vectors_VH)
