"""What needs to run only for the tokens that bear loss: the output head, and most of the last block.

No other token's output of the last block is read by anything: its keys and values are, so those are
made for all, while queries, their attention, the output projection and the MLP are made where a label is
predicted. Loss and gradients are those of the whole block, with fewer products. A block that runs as two operations
(``decoder_block``) does so here too.

Shapes: B rows, T tokens, N tokens that bear loss, H model width; in attention h heads, Q places that ask, D
head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mmtune.models.decoder_block import FusedBlock, fused_forward
from mmtune.models.forwards import running_as
from mmtune.models.segments import without_pieces

Parts = Mapping[str, nn.Module]
# Rows and places of the tokens that bear loss, ``(N,)`` each.
Bears = tuple[torch.Tensor, torch.Tensor]

# How many tokens of the rows come in a later call.
_TO_COME: ContextVar[int] = ContextVar("tokens_to_come", default=0)
# Inside the last block, by its usual names; each works on every token for itself.
_PER_TOKEN = ("self_attn.q_proj", "self_attn.o_proj", "mlp")
_PARTS = (*_PER_TOKEN, "self_attn", "mlp.down_proj")


@contextmanager
def only_label_tokens(model: Any, bears_BT: torch.Tensor) -> Iterator[None]:
    """Within this context logits are ``(1, N, V)``, of the label tokens alone.

    Every family calls its head and its layers with ``(B, T, H)``, so this needs no argument that
    only some know. Virtual tokens may stand before a row.

    Args:
        model: The model, with whatever wraps it.
        bears_BT: ``(B, T)``: whether the token that this one predicts bears loss.
    """
    inner = unwrapped(model)
    head = inner.get_output_embeddings()
    assert isinstance(head, nn.Module)
    rows_N, places_N = bears_BT.nonzero(as_tuple=True)
    tokens = bears_BT.shape[1]

    def select(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_BTH, *rest = given
        return (hidden_BTH[rows_N, places_N + (hidden_BTH.shape[1] - tokens)][None], *rest)

    with ExitStack() as hooks:
        hooks.callback(head.register_forward_pre_hook(select).remove)
        last, parts = _last_block(inner)
        if last is not None and (fused := fused_forward(last)) is not None:
            forward = partial(_run_fused_at, fused, parts, (rows_N, places_N), bears_BT.shape)
            hooks.enter_context(running_as({last: forward}))
        else:
            _run_parts_at(parts, (rows_N, places_N), bears_BT.shape, hooks)
        yield


@contextmanager
def tokens_to_come(count: int) -> Iterator[None]:
    """Within this context the model runs on the beginnings of rows, of which so many tokens come in a later call.

    The later call, which ends where the rows do, needs no such word.
    """
    token = _TO_COME.set(count)
    try:
        yield
    finally:
        _TO_COME.reset(token)


def parts_for_labels(model: Any) -> list[nn.Module]:
    """Returns the parts of a model's last block that run for label tokens alone."""
    _, parts = _last_block(unwrapped(model))
    return [parts[name] for name in _PER_TOKEN if name in parts]


def unwrapped(model: Any) -> Any:
    """Returns what a data-parallel wrapper holds; Accelerate's own look at every module is too long for each step."""
    while not hasattr(model, "get_output_embeddings") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def _last_block(model: Any) -> tuple[nn.Module | None, Parts]:
    """Returns the last block and its parts by name; none where the block is of another make."""
    layers = getattr(getattr(model, "get_decoder", lambda: None)(), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return None, {}
    last = layers[-1]
    # By name: a walk over all modules at each step is a share of a short one.
    parts = {name: part for name in _PARTS if (part := _part(last, name)) is not None}
    # A block of experts may count its tokens; a block that is computed again in the backward pass runs without hooks.
    if getattr(last, "gradient_checkpointing", False) or "mlp.down_proj" not in parts:
        return None, {}
    return last, parts


def _part(block: nn.Module, name: str) -> nn.Module | None:
    found: Any = block
    for step in name.split("."):
        found = getattr(found, step, None)
    return found if isinstance(found, nn.Module) else None


def _run_fused_at(
    fused: FusedBlock,
    parts: Parts,
    bears_N: Bears,
    shape_BT: torch.Size,
    hidden_states: torch.Tensor,
    *args: Any,
    **options: Any,
) -> torch.Tensor:
    """Runs a block for the chosen tokens as two operations, or part by part where the call does not let it."""
    whole = not args and not _TO_COME.get() and hidden_states.shape[:2] == shape_BT and bears_N[0].numel()
    made = fused.run(hidden_states, options, bears_N) if whole else None
    if made is not None:
        return made
    with ExitStack() as hooks:
        # Where hooks are, the block goes its own way.
        _run_parts_at(parts, bears_N, shape_BT, hooks)
        return fused(hidden_states, *args, **options)


def _run_parts_at(parts: Parts, bears_N: Bears, shape_BT: torch.Size, hooks: ExitStack) -> None:
    """Lets the parts of the last block see the chosen tokens alone."""
    rows, tokens = shape_BT
    for name in _PER_TOKEN:
        if name in parts:
            _run_at(parts[name], *bears_N, (rows, tokens), hooks)
    if "self_attn" in parts:
        _ask_at(parts["self_attn"], torch.unique(bears_N[1]), tokens, hooks)


def _run_at(
    module: nn.Module, rows_N: torch.Tensor, places_N: torch.Tensor, shape_BT: tuple[int, int], hooks: ExitStack
) -> None:
    """Lets a module see the chosen tokens alone, as ``(1, N, I)``; its output is zero at all others."""
    rows, tokens = shape_BT
    # What a call of the module hands on to its end: the shape of all tokens, and where the chosen ones stand.
    begun: list[tuple[torch.Size, tuple[torch.Tensor, torch.Tensor]]] = []

    def chosen(shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        # A model of several passes runs on each row several times, one after the other.
        times, at_N, inside_N = shape[0] // rows, *_given(places_N, tokens, shape[1])
        if not at_N.numel():
            # Some kernels refuse to run on nothing; what is made of one token is read by nobody.
            return (rows_N.new_zeros(1),) * 2
        own_N = (rows_N[inside_N, None] * times + torch.arange(times, device=rows_N.device)).flatten()
        return own_N, at_N.repeat_interleave(times)

    def select(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_BTI, *rest = given
        places = chosen(hidden_BTI.shape)
        begun.append((hidden_BTI.shape, places))
        return (hidden_BTI[places][None], *rest)

    def put_back(_: nn.Module, given: tuple[Any, ...], made_1NO: torch.Tensor) -> torch.Tensor:
        shape, places = begun.pop()
        whole_BTO = made_1NO.new_zeros(shape[0], shape[1], made_1NO.shape[-1])
        return whole_BTO.index_put(places, made_1NO[0])

    hooks.callback(module.register_forward_pre_hook(select).remove)
    hooks.callback(module.register_forward_hook(put_back).remove)


def _given(places_N: torch.Tensor, tokens: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns where some places of rows stand in a call with ``length`` tokens, and ``(N,)`` which stand there."""
    at_N = places_N + (length + _TO_COME.get() - tokens)
    inside_N = (at_N >= 0) & (at_N < length)
    return at_N[inside_N], inside_N


def _ask_at(attention: nn.Module, places_Q: torch.Tensor, tokens: int, hooks: ExitStack) -> None:
    """Lets the queries at some places alone go through PyTorch's attention; its output is zero at all others."""
    mode = _FewQueries(places_Q, tokens)
    entered = ExitStack()

    def enter(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        entered.enter_context(mode)
        # Few queries are asked of all keys at once: fewer products than piece by piece.
        return given, {name: without_pieces(value) for name, value in named.items()}

    hooks.callback(attention.register_forward_pre_hook(enter, with_kwargs=True).remove)
    hooks.callback(attention.register_forward_hook(lambda *_: entered.close(), always_call=True).remove)


class _FewQueries(TorchFunctionMode):
    """Within this mode attention is computed for the queries at some places of every row."""

    def __init__(self, places_Q: torch.Tensor, tokens: int) -> None:
        super().__init__()
        self._places_Q, self._tokens = places_Q, tokens

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not functional.scaled_dot_product_attention or len(args) != 3:
            return func(*args, **kwargs) if kwargs else func(*args)
        options = dict(kwargs or {})
        query_BhTD, key, value = args
        length = query_BhTD.shape[2]
        at_Q, _ = _given(self._places_Q, self._tokens, length)
        mask = options.get("attn_mask")
        if 2 * at_Q.numel() > length or (mask is not None and mask.shape[-2] != length):
            return func(*args, **options)
        if not at_Q.numel():
            return value.new_zeros(*query_BhTD.shape[:3], value.shape[-1])
        if options.pop("is_causal", False):
            mask = torch.arange(key.shape[2], device=key.device) <= at_Q[:, None]
        elif mask is not None:
            mask = mask[..., at_Q, :]
        made_BhQD = func(query_BhTD[:, :, at_Q], key, value, **{**options, "attn_mask": mask})
        whole_BhTD = made_BhQD.new_zeros(*query_BhTD.shape[:3], made_BhQD.shape[-1])
        return whole_BhTD.index_copy(2, at_Q, made_BhQD)
