"""What a frozen tower makes of media, apart from the training step, and how it enters the model there.

Two forms are kept. Behind a frozen projector: the rows that stand at the media tokens. Before a
projector that trains: what enters it (see ``projector_input``), so that it runs live, with gradients.

Images go into transformers' models as ``mm_encoder_outputs`` in place of pixels. Sounds, for which
its models take nothing of the kind, go in where the audio tokens are embedded. The composite model
takes both in place of media, and its fusion asks for them there.

Shapes: B rows, T tokens, N media tokens, H model width, U units of a projector.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from mmtune.models.forwards import running_as
from mmtune.models.projector_input import Call, behind, enters, watched

_PLURAL = {"image": "images", "audio": "sounds"}
_LIST, _BLOCK, _DEEP, _AUDIO = "image_features", "image_features_block", "image_deepstack_", "audio_features"


def takes_none(model: Any, kind: str) -> str:
    """Returns why a model takes no outputs of a tower in place of media of a kind; empty when it does."""
    base = base_of(model)
    if getattr(base.config, "projectors", {}).get(kind, {}).get("instruction"):
        return f"the resampler reads the instruction with the {_PLURAL[kind][:-1]}"
    if kind == "image":
        fits = (
            hasattr(base, "get_image_features") and "mm_encoder_outputs" in inspect.signature(base.forward).parameters
        )
    else:
        fits = getattr(base.config, "audio_token_id", None) is not None
    return "" if fits else f"this family takes no features of {_PLURAL[kind]} in their place"


def encoder_outputs(
    model: Any, kind: str, tensors: Mapping[str, torch.Tensor], tokens: int, *, before_projector: bool
) -> dict[str, torch.Tensor]:
    """Returns what stands for some media, by name: one row per media token ``(N, H)``, in order.

    A family whose model takes one tensor of images where others take a list has another name for
    it, and the features of deeper layers, ``(N, H)`` each, have theirs. With ``before_projector``
    the names are those of ``projector_input.enters``.

    Args:
        model: In evaluation mode.
        kind: ``image`` or ``audio``.
        tensors: What the processor made of the media.
        tokens: N.
        before_projector: Keep what enters the projector, where the media go through one.

    Raises:
        ValueError: There is another number of rows, or what comes out of the projector is mixed with something else.
    """
    base = base_of(model)
    if before_projector and "frame_milliseconds" in tensors and bool((tensors["frame_milliseconds"] >= 0).any()):
        raise ValueError("the projector also learns when the frames of a video were taken")
    seen: AbstractContextManager[list[Call]] = watched(base) if before_projector else nullcontext([])
    with torch.no_grad(), seen as calls:
        rows = _image_rows(base, tensors) if kind == "image" else {_AUDIO: _audio_rows(base, tensors, tokens)}
    for name, found in rows.items():
        if len(found) != tokens:
            raise ValueError(f"the tower makes {len(found)} rows of {name} for {tokens} tokens")
    if calls:
        return enters(base, rows, calls)
    return {name: found.contiguous() for name, found in rows.items()}


@contextmanager
def encoder_outputs_in(model: Any, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Gives a model's inputs in which kept outputs, if there are any, stand for media; call the model inside."""
    base = base_of(model)
    rows, rest = behind(base, inputs, (_LIST, _BLOCK, _DEEP, _AUDIO))
    given = {"image": _as_outputs(rows)} if _LIST in rows or _BLOCK in rows else {}
    if _AUDIO in rows and _takes_sounds(base):
        given["audio"] = _as_outputs({_LIST: rows.pop(_AUDIO)})
    if given:
        rest["mm_encoder_outputs"] = given
    if _AUDIO not in rows:
        yield rest
        return
    sounds_NH, token = rows[_AUDIO], base.config.audio_token_id

    def at_audio_tokens(_: Any, given: tuple[torch.Tensor, ...], embedded_BTH: torch.Tensor) -> torch.Tensor:
        places_BT1 = (given[0] == token)[..., None]
        if int(places_BT1.sum()) != len(sounds_NH):
            raise ValueError(f"{len(sounds_NH)} rows stand for {int(places_BT1.sum())} audio tokens")
        return embedded_BTH.masked_scatter(places_BT1, sounds_NH.to(embedded_BTH.dtype))

    hook = base.get_input_embeddings().register_forward_hook(at_audio_tokens)
    try:
        yield rest
    finally:
        hook.remove()


def base_of(model: Any) -> Any:
    """Returns the transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _takes_sounds(base: Any) -> bool:
    """Says whether a model takes sounds too as ``mm_encoder_outputs``, as our composite one does."""
    return hasattr(base.config, "projectors")


def _image_rows(base: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    known = inspect.signature(base.get_image_features).parameters
    given = {name: value for name, value in tensors.items() if name in known}
    made = base.get_image_features(**given, return_dict=True)
    pooled = made.pooler_output
    rows = {_BLOCK: pooled.flatten(0, -2)} if torch.is_tensor(pooled) else {_LIST: _joined(pooled)}
    deep = getattr(made, "deepstack_features", None) or ()
    return rows | {f"{_DEEP}{index}": _joined(layer) for index, layer in enumerate(deep)}


def _as_outputs(rows: Mapping[str, torch.Tensor]) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    pooled: Any = rows[_BLOCK][None] if _BLOCK in rows else [rows[_LIST]]
    made = BaseModelOutputWithPooling(pooler_output=pooled)
    deep = [f"{_DEEP}{index}" for index in range(sum(name.startswith(_DEEP) for name in rows))]
    if deep:
        made.deepstack_features = [[rows[name]] for name in deep]
    return made


def _audio_rows(base: Any, tensors: Mapping[str, torch.Tensor], tokens: int) -> torch.Tensor:
    """Returns what the model puts at a row of audio tokens; its language model hands on what it is given."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    if _takes_sounds(base):
        given = {name: tensors[name] for name in ("input_features", "feature_attention_mask") if name in tensors}
        return _joined(base.get_audio_features(**given).pooler_output)
    inner, embeddings, decoder = base.base_model, base.get_input_embeddings(), base.get_decoder()
    known = inspect.signature(inner.forward).parameters
    ids = torch.full((1, tokens), base.config.audio_token_id, device=next(iter(tensors.values())).device)
    width, dtype = base.config.get_text_config().hidden_size, embeddings.weight.dtype

    def no_words(ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*ids.shape, width, dtype=dtype, device=ids.device)

    def handed_on(**given: Any) -> Any:
        return BaseModelOutputWithPast(last_hidden_state=given["inputs_embeds"])

    with running_as({embeddings: no_words, decoder: handed_on}):
        made = inner(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(tokens, device=ids.device)[None],
            use_cache=False,
            **{name: value for name, value in tensors.items() if name in known},
        )
    rows: torch.Tensor = made.last_hidden_state[0]
    return rows


def _joined(parts: Any) -> torch.Tensor:
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
