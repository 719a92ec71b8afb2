"""A block of a Llama-like decoder as two operations, on a CPU: ``x + o(attention(norm(x)))`` and ``x + mlp(norm(x))``.

Autograd walks some thirty small steps of a block, each with tensors of its own. Here each half is one step
(``half_block``), and rotations are written where they are read.

Shapes: B rows, T tokens, N of all rows; H model width; q heads that ask, g heads of keys and values, D their width; the
rest as in ``projections`` and ``strips``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mmtune.models.forwards import running_as
from mmtune.models.half_block import Half, halves_of, layers_of, like, run_mlp
from mmtune.models.label_block import asked_of, run_asked
from mmtune.models.rms_norm import normed
from mmtune.models.rotary import turned
from mmtune.models.segments import Piece, strips_of, with_pieces
from mmtune.models.spread import is_sharded
from mmtune.models.strips import Strip, attended, attended_back

_PARTS = {
    "": {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
_UNREAD = ("position_ids", "use_cache")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTH: torch.Tensor,
        half: Half,
        cos: torch.Tensor,
        sin: torch.Tensor,
        rows: Sequence[Sequence[Strip]],
        scaling: float,
        *adapters: torch.Tensor,
    ) -> torch.Tensor:
        x_NH = x_BTH.reshape(-1, x_BTH.shape[-1])
        normed_NH, scale_N1 = normed(x_NH, half.norm_H, half.epsilon)
        made, inner_RN = half.first.project(normed_NH)
        query_BTqD, key_BTgD, value_BTgD = (own.view(*x_BTH.shape[:2], -1, cos.shape[-1]) for own in made)
        query_BTqD, key_BTgD = turned(query_BTqD, cos, sin, 1), turned(key_BTgD, cos, sin, 1)
        mixed_BTqD, kept = torch.empty_like(query_BTqD), []
        for number, strips in enumerate(rows):
            given = _given(number, query_BTqD, key_BTgD, value_BTgD)
            kept += attended(given, strips, scaling, mixed_BTqD[number])
        mixed_NI = mixed_BTqD.view(len(x_NH), -1)
        (made_NH,), inner_rN = half.last.project(mixed_NI)
        saved = x_NH, normed_NH, scale_N1, inner_RN, query_BTqD, key_BTgD, value_BTgD, mixed_NI, inner_rN, cos, sin
        ctx.save_for_backward(*saved, *kept)
        ctx.half, ctx.rows, ctx.scaling = half, rows, scaling
        return made_NH.add_(x_NH).view(x_BTH.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BTH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NH, normed_NH, scale_N1, inner_RN, *more = ctx.saved_tensors
        query_BTqD, key_BTgD, value_BTgD, mixed_NI, inner_rN, cos, sin, *rest = more
        half: Half = ctx.half
        grad_NH, kept = grad_BTH.reshape(x_NH.shape), iter(rest)
        mixed_grad, last = half.last.project_back([grad_NH], mixed_NI, inner_rN)
        mixed_grad_BTqD, value_grad = mixed_grad.view(query_BTqD.shape), torch.empty_like(value_BTgD)
        # Side by side, to be turned back together.
        parts = [query_BTqD.shape[2], key_BTgD.shape[2]]
        turned_grad = query_BTqD.new_empty(*query_BTqD.shape[:2], sum(parts), query_BTqD.shape[3])
        query_grad, key_grad = turned_grad.split_with_sizes(parts, 2)
        for number, strips in enumerate(ctx.rows):
            given, own = _given(number, query_BTqD, key_BTgD, value_BTgD), [next(kept) for _ in strips]
            into = query_grad[number], key_grad[number], value_grad[number]
            attended_back(mixed_grad_BTqD[number], given, own, strips, ctx.scaling, into)
        first_grads = (*turned(turned_grad, cos, sin, -1).split_with_sizes(parts, 2), value_grad)
        grads = [grad.flatten(2).flatten(0, 1) for grad in first_grads]
        x_grad, first = half.back(grad_NH, grads, x_NH, normed_NH, scale_N1, inner_RN, wanted=ctx.needs_input_grad[0])
        return like(grad_BTH, x_grad), None, None, None, None, None, *first, *last


def _given(number: int, *asked_and_told: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns queries, keys and values of a row by heads."""
    return tuple(made[number].transpose(0, 1) for made in asked_and_told)


class FusedBlock:
    """The forward of a block that computes as Llama's does, as two operations.

    A call that asks for more than they compute goes the block's own way: other types than fp32, hooks inside, a cache,
    checkpointing, rows too long for strips.
    """

    def __init__(self, block: Any) -> None:
        self._block, self._halves = block, halves_of(block)

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """Returns what the block makes."""
        made = None if args else self.run(hidden_states, options)
        if made is None:
            own: torch.Tensor = type(self._block).forward(self._block, hidden_states, *args, **options)
            return own
        return made

    def run(
        self,
        hidden_BTH: torch.Tensor,
        options: Mapping[str, Any],
        bears: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | None:
        """Returns what the block makes in two operations; None where it has to go its own way.

        Args:
            hidden_BTH: Its input.
            options: Of the call, by name.
            bears: Rows and places of the tokens whose output alone is read, in order; it is zero at all others.
        """
        asked = {name for name, value in options.items() if value is not None and name not in _UNREAD}
        named = asked == {"attention_mask", "position_embeddings"} and not options.get("use_cache")
        if not named or not _is_free(self._block, hidden_BTH):
            return None
        attention, mask, (cos, sin) = self._block.self_attn, options["attention_mask"], options["position_embeddings"]
        rows = strips_of(mask, attention.config.num_attention_heads, hidden_BTH.dtype)
        plain = cos.dtype == hidden_BTH.dtype and cos.shape[2:] == (attention.head_dim,) and not cos.requires_grad
        self._halves = halves_of(self._block, self._halves)
        if rows is None or len(rows) != len(hidden_BTH) or self._halves is None or not plain:
            return None
        turn = cos[:, :, None], sin[:, :, None]
        if bears is not None:
            return run_asked(hidden_BTH, self._halves, *turn, asked_of(mask[:, 0], *bears), attention.scaling)
        first, second = self._halves
        made_BTH = _Attention.apply(hidden_BTH, first, *turn, rows, attention.scaling, *first.adapters)
        return run_mlp(made_BTH, second)


@contextmanager
def fused_blocks(model: nn.Module) -> Iterator[int]:
    """Within this context every block that computes as Llama's does runs as two operations; gives how many do."""
    blocks = [] if is_sharded(model) else [module for module in model.modules() if _is_plain(module)]
    with running_as({block: FusedBlock(block) for block in blocks}):
        yield len(blocks)


def fused_forward(block: nn.Module) -> FusedBlock | None:
    """Returns the forward of a block that runs as two operations at the moment, where a call lets it."""
    forward = vars(block).get("forward")
    return forward if isinstance(forward, FusedBlock) else None


def _is_free(block: Any, hidden_BTH: torch.Tensor) -> bool:
    """Whether nothing else wants to happen inside a block: another type, a hook, dropout, checkpoints."""
    usual = (
        hidden_BTH.dtype == torch.float32 and hidden_BTH.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    )
    dropout = block.training and block.self_attn.attention_dropout
    if not usual or dropout or getattr(block, "gradient_checkpointing", False):
        return False
    parts = block._modules
    called = [*(parts[name] for name in _PARTS[""]), parts["mlp"]._modules["act_fn"], *layers_of(block)]
    return all(not (part._forward_hooks or part._forward_pre_hooks) for part in called)


def _is_plain(block: nn.Module) -> bool:
    """Whether a module is a block as Llama's, by its parts and by what it makes of some numbers while it trains."""
    if "forward" in vars(block) or not all(_has_parts(block, name, parts) for name, parts in _PARTS.items()):
        return False
    attention: Any = block.self_attn
    norms: list[Any] = [block.input_layernorm, block.post_attention_layernorm]
    named = all(hasattr(attention, name) for name in ("config", "scaling", "head_dim", "attention_dropout"))
    if not named or not all(hasattr(norm, "variance_epsilon") for norm in norms) or halves_of(block) is None:
        return False
    plain = all(value.dtype == torch.float32 and value.device.type == "cpu" for value in block.parameters())
    return plain and attention.config._attn_implementation == "sdpa" and _computes_as_llamas(block)


def _has_parts(block: nn.Module, name: str, parts: set[str]) -> bool:
    part = getattr(block, name, None) if name else block
    return isinstance(part, nn.Module) and {own for own, _ in part.named_children()} == parts


def _computes_as_llamas(block: Any) -> bool:
    width, head, tokens, training = len(block.input_layernorm.weight), block.self_attn.head_dim, 3, block.training
    x_BTH = torch.linspace(-1.0, 40.0, tokens * width).sin().view(1, tokens, width)
    angles = torch.linspace(0.0, 2.0, tokens * (head // 2)).view(1, tokens, -1).repeat(1, 1, 2)
    mask = torch.full((1, 1, tokens, tokens), torch.finfo(x_BTH.dtype).min).triu(1)
    options = {
        "attention_mask": with_pieces(mask, [[Piece((0, tokens), ((0, tokens),), True)]], causal=True),
        "position_embeddings": (angles.cos(), angles.sin()),
    }
    try:
        block.train()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            made, own = FusedBlock(block).run(x_BTH, options), type(block).forward(block, x_BTH, **options)
    finally:
        block.train(training)
    # What a block adds to its input is a small part of it, and attention a small part of that.
    return made is not None and torch.is_tensor(own) and bool((made - own).norm() <= 1e-4 * (own - x_BTH).norm())
