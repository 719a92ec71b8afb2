"""Media beside the sequence: what cross- and co-attention put between the layers of a language model.

The blocks stand before chosen layers as hooks, so that the language model keeps its shape and its names. What they
need comes with the call of each layer, and so also when a layer is computed again in the backward pass.

Shapes: B rows, T tokens, M media tokens, H width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mmtune.errors import CapabilityError
from mmtune.models.fusion.co_attention import CoAttention
from mmtune.models.fusion.gated_cross import GatedCrossAttention

ARGUMENT = "media_stream"


@dataclass
class MediaStream:
    """The media of a batch on their way through the layers.

    Attributes:
        media: ``(B, M, H)`` as the projectors made them.
        text_sees: ``(B, T, M)``.
        media_sees: ``(B, M, T)``, for co-attention.
        incoming: Per layer of co-attention, the media stream that comes into it.
        fixed: The media have met their prompt before; ``incoming`` is complete.
        outgoing: The media stream behind the last layer of co-attention.
    """

    media: torch.Tensor
    text_sees: torch.Tensor
    media_sees: torch.Tensor | None = None
    incoming: dict[int, torch.Tensor] = field(default_factory=dict)
    fixed: bool = False
    outgoing: torch.Tensor | None = None


def add_blocks(model: nn.Module, config: Any) -> nn.ModuleDict:
    """Puts blocks of ``fusion.attention`` before ``fusion.layers`` of a decoder; returns them by layer.

    Raises:
        CapabilityError: The decoder has no list of layers.
    """
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise CapabilityError(
            f"{type(model).__name__} has no list of layers to put attention between",
            "use fusion.attention: none, or another language model",
            "fusion_unsupported",
        )
    width, heads = config.text_config.hidden_size, config.text_config.num_attention_heads
    chosen = sorted(config.fusion["layers"])
    blocks = nn.ModuleDict()
    kind = config.fusion["attention"]
    for place, layer in enumerate(layers):
        if place in chosen:
            blocks[str(place)] = (
                GatedCrossAttention(width, heads, width) if kind == "cross" else CoAttention(width, width, heads)
            )
        after = next((later for later in chosen if later > place), None)
        layer.register_forward_pre_hook(_Before(place, blocks, kind, after), with_kwargs=True)
    return blocks


class _Before:
    """Runs before a layer: takes the stream out of its arguments and lets its block change the hidden states.

    The block is looked up at every call: PEFT puts a copy that trains in its place.
    """

    def __init__(self, place: int, blocks: nn.ModuleDict, kind: str, after: int | None) -> None:
        self.place, self.blocks, self.kind, self.after = place, blocks, kind, after

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if ARGUMENT not in kwargs:
            raise CapabilityError(
                f"{type(layer).__name__} is not handed what its model is given, so no media reach it",
                "use fusion.attention: none, or another language model",
                "fusion_unsupported",
            )
        rest = {name: value for name, value in kwargs.items() if name != ARGUMENT}
        stream: MediaStream = kwargs[ARGUMENT]
        if str(self.place) not in self.blocks:
            return args, rest
        block = self.blocks[str(self.place)]
        hidden, *others = args
        if self.kind == "cross":
            return (block(hidden, stream.media, stream.text_sees), *others), rest
        media = stream.incoming.setdefault(self.place, stream.media)
        hidden, media = block(hidden, media, stream.text_sees, stream.media_sees)
        if self.after is not None and not stream.fixed:
            stream.incoming[self.after] = media
        stream.outgoing = media
        return (hidden, *others), rest
