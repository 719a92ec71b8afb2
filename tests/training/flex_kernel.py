"""FlexAttention for tests on a CPU, where PyTorch has no backward pass of it."""

from __future__ import annotations

from typing import Any

import torch


def by_hand(monkeypatch: Any) -> None:
    """Stands in for FlexAttention's kernel, as transformers calls it.

    Like the kernel, it looks at a mask's rule in partial blocks only.
    """
    import transformers.integrations.flex_attention as integration
    from torch.nn.attention.flex_attention import BlockMask, create_mask

    def seen(mask: BlockMask) -> torch.Tensor:
        rows, length = mask.shape[0], mask.shape[2]
        rule = create_mask(mask.mask_mod, rows, None, length, length, device="cpu")
        full = BlockMask.from_kv_blocks(mask.full_kv_num_blocks, mask.full_kv_indices).to_dense()
        some = BlockMask.from_kv_blocks(mask.kv_num_blocks, mask.kv_indices).to_dense()
        size = mask.BLOCK_SIZE[0]
        full, some = (b.repeat_interleave(size, -1).repeat_interleave(size, -2).bool() for b in (full, some))
        return full | (some & rule)

    def by_hand(query: Any, key: Any, value: Any, *, block_mask: Any, scale: float, **options: Any) -> Any:
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, attn_mask=seen(block_mask), scale=scale, enable_gqa=options["enable_gqa"])

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", by_hand)
