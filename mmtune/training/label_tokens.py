"""What needs to run only for the tokens that bear loss: the output head, and most of the last block.

No other token's output of the last block is read by anything: its keys and values are, so those are
made for all, while queries, the output projection and the MLP are made where a label is predicted.
Loss and gradients are those of the whole block, with fewer products.

Shapes: B rows, T tokens, N tokens that bear loss, H model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

# Inside the last block, by its usual names; each works on every token for itself.
_PER_TOKEN = ("self_attn.q_proj", "self_attn.o_proj", "mlp")


@contextmanager
def only_label_tokens(model: Any, bears_BT: torch.Tensor) -> Iterator[None]:
    """Within this context logits are ``(1, N, V)``, of the label tokens alone.

    Every family calls its head and its layers with ``(B, T, H)``, so this needs no argument that
    only some know. Virtual tokens may stand before a row.

    Args:
        model: The model, with whatever wraps it.
        bears_BT: ``(B, T - 1)``: whether the token after this one bears loss. The last token of a row
            is left out, as it predicts none.
    """
    from accelerate.utils import extract_model_from_parallel

    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    head = inner.get_output_embeddings()
    assert isinstance(head, nn.Module)
    rows_N, places_N = bears_BT.nonzero(as_tuple=True)
    tokens = bears_BT.shape[1] + 1

    def select(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_BTH, *rest = given
        return (hidden_BTH[rows_N, places_N + (hidden_BTH.shape[1] - tokens)][None], *rest)

    with ExitStack() as hooks:
        hooks.callback(head.register_forward_pre_hook(select).remove)
        for module in _per_token_modules(inner):
            _run_at(module, rows_N, places_N, (bears_BT.shape[0], tokens), hooks)
        yield


def _per_token_modules(model: Any) -> list[nn.Module]:
    """Returns the parts of the last block that no other token waits for; none where the block is of another make."""
    layers = getattr(getattr(model, "get_decoder", lambda: None)(), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return []
    last = layers[-1]
    parts: Mapping[str, nn.Module] = dict(last.named_modules())
    # A block of experts may count its tokens; a block that is computed again in the backward pass runs without hooks.
    if getattr(last, "gradient_checkpointing", False) or "mlp.down_proj" not in parts:
        return []
    return [parts[name] for name in _PER_TOKEN if name in parts]


def _run_at(
    module: nn.Module, rows_N: torch.Tensor, places_N: torch.Tensor, shape_BT: tuple[int, int], hooks: ExitStack
) -> None:
    """Lets a module see the chosen tokens alone, as ``(1, N, I)``; its output is zero at all others."""
    rows, tokens = shape_BT
    shapes: list[torch.Size] = []

    def chosen(shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        # A model of several passes runs on each row several times, one after the other.
        times = shape[0] // rows
        own_N = (rows_N[:, None] * times + torch.arange(times, device=rows_N.device)).flatten()
        return own_N, places_N.repeat_interleave(times) + (shape[1] - tokens)

    def select(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_BTI, *rest = given
        shapes.append(hidden_BTI.shape)
        return (hidden_BTI[chosen(hidden_BTI.shape)][None], *rest)

    def put_back(_: nn.Module, given: tuple[Any, ...], made_1NO: torch.Tensor) -> torch.Tensor:
        shape = shapes.pop()
        whole_BTO = made_1NO.new_zeros(shape[0], shape[1], made_1NO.shape[-1])
        return whole_BTO.index_put(chosen(shape), made_1NO[0])

    hooks.callback(module.register_forward_pre_hook(select).remove)
    hooks.callback(module.register_forward_hook(put_back).remove)
