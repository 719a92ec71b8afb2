"""The output head run apart from its model, so that what uses logits can have them of a few tokens at a time.

It may be where the model hands on what its head makes as it is. Some cap or scale logits (Gemma 2, Granite, Cohere),
and late fusion mixes them: their head stays inside.

Shapes: B rows, T tokens, H what a head takes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from mmtune.models.attention import attention_by, is_flex, text_attention
from mmtune.models.composite.scores import branches_of_config
from mmtune.models.forwards import running_as
from mmtune.models.label_tokens import unwrapped
from mmtune.models.spread import is_sharded

_KNOWN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
MEDIA_IDS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")
"""What configs call the ids of media tokens."""


def head_to_run_apart(model: Any) -> nn.Module | None:
    """Returns the output head of a model; None where it has to run inside.

    Found out once per head, by a forward pass over two tokens that leaves random numbers as they were. FlexAttention,
    which wants the masks of packed trees, stands back for it.

    Args:
        model: With whatever wraps it.
    """
    head: nn.Module = unwrapped(model).get_output_embeddings()
    if head not in _KNOWN:
        config = unwrapped(model).config
        plain = hasattr(head, "out_features") and not branches_of_config(config) and not is_sharded(model)
        _KNOWN[head] = plain and _is_handed_on(model, head, config)
    return head if _KNOWN[head] else None


@contextmanager
def left_out(head: nn.Module | None) -> Iterator[list[torch.Tensor]]:
    """Within this context a head hands on what it is given, ``(B, T, H)``, and that is put into the list.

    Args:
        head: None changes nothing.
    """
    given: list[torch.Tensor] = []
    if head is None:
        yield given
        return

    def hand_on(hidden: torch.Tensor) -> torch.Tensor:
        given.append(hidden)
        return hidden

    with running_as({head: hand_on}):
        yield given


def _is_handed_on(model: Any, head: nn.Module, config: Any) -> bool:
    media = {getattr(config, name, None) for name in MEDIA_IDS}
    word = next(number for number in range(len(media) + 1) if number not in media)
    device = next(head.parameters()).device
    ids = torch.full((1, 2), word, device=device)
    own, bare = [device] if device.type == "cuda" else [], unwrapped(model)
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=own),
        attention_by(bare, "eager" if is_flex(bare) else text_attention(bare)),
        left_out(head) as given,
    ):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return len(given) == 1 and logits is given[0]
