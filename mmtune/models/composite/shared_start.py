"""The beginning of rows, run once for all passes: words, and behind them the first run of media of one modality.

With causal attention a token sees what stands before it alone. Where that is words every pass makes the same of it, and
so it does of media behind words alone, in whatever pass these are seen at all. Their keys and values then serve the
passes as those of earlier tokens serve later ones while generating; gradients flow back through them. What a pass that
does not see the media makes at their places has no weight: the gate leaves out branches whose media are not there yet.

Shapes: B rows, T tokens, S of them shared, P passes, H width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mmtune.models.composite.fuse import Run
from mmtune.models.composite.masks import is_padding
from mmtune.models.composite.passes import TEXT
from mmtune.models.label_tokens import tokens_to_come

_PLAIN_LAYERS = (None, "full_attention")
_STATES = ("output_hidden_states", "output_attentions")


def shared_start(
    language_model: nn.Module, kinds_BT: torch.Tensor, passes: int, past: Any, asked: Any, *, words_alone: bool
) -> int:
    """Returns S: how many leading tokens every pass makes the same of, where they can be run once; else 0.

    They cannot where one pass is all, where layers keep no keys and values (they are computed again in the backward
    pass) or not all of them (sliding windows), and where somebody wants to see the layers' own states.

    Args:
        language_model: With ``config``.
        kinds_BT: Kinds of the tokens, see ``passes.kind_of``.
        passes: P.
        past: The cache of the call, or None.
        asked: Further arguments of the call.
        words_alone: Media may be hidden from all passes, and then the gate weighs all at their places.
    """
    config: Any = language_model.config
    layers = getattr(config, "layer_types", None) or (None,)
    windowed = getattr(config, "sliding_window", None) or any(kind not in _PLAIN_LAYERS for kind in layers)
    again = language_model.training and getattr(language_model, "is_activation_checkpointing", False)
    states = any(asked.get(name) or getattr(config, name, False) for name in _STATES)
    kept = past is None or (type(past) is DynamicCache and all(type(layer) is DynamicLayer for layer in past.layers))
    if passes == 1 or windowed or again or states or not kept:
        return 0
    media_BT = kinds_BT != TEXT
    first_B = kinds_BT.gather(1, media_BT.int().argmax(1, keepdim=True))
    parts_BT = media_BT if words_alone else (media_BT.cumsum(1) > 0) & (kinds_BT != first_B)
    parts_T = parts_BT.any(0)
    return int(parts_T.int().argmax()) if bool(parts_T.any()) else 0


def run_in_two(
    language_model: nn.Module, run: Run, shared: int, positions_BT: torch.Tensor | None, **given: Any
) -> Any:
    """Returns what the language model makes of all passes, their first tokens run once.

    Args:
        language_model: Without its head.
        run: What it runs on.
        shared: S, at least 1 and less than T.
        positions_BT: Along all that the rows hold, as those see the first tokens who see them at all; or None.
        given: ``position_ids`` ``(B * P, T)`` or None, ``past_key_values`` of B rows or None, ``use_cache`` and others.
    """
    positions, past, use_cache = (given.pop(name, None) for name in ("position_ids", "past_key_values", "use_cache"))
    cache = DynamicCache() if past is None else past
    passes, mask, rows = run.passes.count, run.mask, slice(None, None, run.passes.count)
    with tokens_to_come(run.embeds.shape[1] - shared):
        first = language_model(
            inputs_embeds=run.embeds[rows, :shared],
            attention_mask=_of_first(run.row_mask, shared, run.embeds.shape[1]),
            position_ids=None if positions_BT is None else positions_BT[:, :shared],
            past_key_values=cache,
            use_cache=True,
            **given,
        )
    cache.batch_repeat_interleave(passes)
    made = language_model(
        inputs_embeds=run.embeds[:, shared:],
        attention_mask=mask if is_padding(mask) else mask[:, :, shared:],
        position_ids=None if positions is None else positions[:, shared:],
        past_key_values=cache,
        use_cache=True,
        **given,
    )
    start = first.last_hidden_state.repeat_interleave(passes, 0)
    made.last_hidden_state = torch.cat((start, made.last_hidden_state), dim=1)
    config: Any = language_model.config
    wanted = config.use_cache if use_cache is None else use_cache
    made.past_key_values = cache if wanted or past is not None else None
    return made


def _of_first(mask: torch.Tensor | None, shared: int, tokens: int) -> torch.Tensor | None:
    """Returns what of a mask of T tokens, and virtual ones before them, is about the first ones."""
    if mask is None:
        return None
    keys = slice(mask.shape[-1] - tokens + shared)
    return mask[:, keys] if is_padding(mask) else mask[:, :, :shared, keys]
