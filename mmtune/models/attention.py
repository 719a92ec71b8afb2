"""The attention kernel of the language model, by transformers' attention registry; towers keep theirs.

FlexAttention is registered under a name of our own: some families that call the registry have
not declared that they take it, and those that train in mixed precision hand it queries and
values of different types. Whether it is exact is checked on real rows, not declared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FLEX = "flex_attention"
_REGISTERED = "mmtune_flex"


def text_attention(model: Any) -> str:
    """Returns the name of the kernel that the language model runs."""
    kernel: str | None = model.config.get_text_config()._attn_implementation
    return FLEX if kernel == _REGISTERED else kernel or "sdpa"


def is_flex(model: Any) -> bool:
    """Says whether the language model runs FlexAttention."""
    return text_attention(model) == FLEX


def use_text_attention(model: Any, kernel: str) -> None:
    """Sets the kernel of the language model, in place."""
    if kernel == FLEX:
        from transformers import AttentionInterface

        AttentionInterface.register(_REGISTERED, _flex_attention)
        kernel = _REGISTERED
    config, text = model.config, model.config.get_text_config()
    own = [name for name in config.sub_configs if getattr(config, name, None) is text]
    model.set_attn_implementation({own[0]: kernel} if own else kernel)


@contextmanager
def attention_by(model: Any, kernel: str) -> Iterator[None]:
    """Within this context the language model runs another kernel, forward and backward."""
    before = text_attention(model)
    if kernel == before:
        yield
        return
    use_text_attention(model, kernel)
    try:
        yield
    finally:
        use_text_attention(model, before)


def flex_fits(model: Any) -> bool:
    """Says whether FlexAttention can stand for the language model's own attention: it has no dropout."""
    return not getattr(model.config.get_text_config(), "attention_dropout", 0.0)


def _flex_attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
    """Transformers' FlexAttention of packed trees, in the type of the values as SDPA does under autocast."""
    from torch.nn.attention.flex_attention import BlockMask
    from transformers.integrations.flex_attention import flex_attention_forward

    if not isinstance(attention_mask, BlockMask):
        raise TypeError("FlexAttention is for packed trees, which bring a block mask")
    query, key = query.to(value.dtype), key.to(value.dtype)
    return flex_attention_forward(module, query, key, value, attention_mask, **options)
