"""The summed cross-entropy of a batch, with logits only where there is a label.

Shapes: B rows, T tokens, N tokens that bear loss, H model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mmtune.models.image_features import with_encoder_outputs
from mmtune.training.tree_mask import MaskRules, attention_mask

IGNORED = -100
# Most logits that stand in fp32 at once (64 MiB).
_CHUNK_LOGITS = 1 << 24


def answer_loss(
    model: Any, batch: Mapping[str, torch.Tensor], rules: MaskRules | None = None
) -> tuple[torch.Tensor, int]:
    """Returns the summed cross-entropy in fp32 over the label tokens, and their number.

    Args:
        model: Called with the batch less ``labels`` and ``layout``, features as ``mm_encoder_outputs``.
        batch: Padded rows, or packed trees as ``TreeCollator`` makes them; ``labels`` is
            ``(B, T)`` with -100 where there is no loss.
        rules: The model's attention; wanted for packed trees.
    """
    labels_BT = batch["labels"]
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name not in ("labels", "layout")}
    if "layout" in batch:
        assert rules is not None
        inputs["attention_mask"] = attention_mask(batch["layout"], rules)
    bears_BT = labels_BT[:, 1:] != IGNORED
    with _head_at(_output_head(model), bears_BT):
        logits_NV = model(**with_encoder_outputs(inputs), use_cache=False).logits[0]
    targets_N = labels_BT[:, 1:][bears_BT]
    return chunked_cross_entropy(logits_NV, targets_N), targets_N.numel()


def chunked_cross_entropy(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Returns the sum of ``-log p(target)`` in fp32; probabilities are never all held at once."""
    size = max(_CHUNK_LOGITS // max(logits_NV.shape[-1], 1), 1)
    if logits_NV.shape[0] <= size:
        return _cross_entropy(logits_NV, targets_N)
    parts = zip(logits_NV.split(size), targets_N.split(size), strict=True)
    # The fp32 copy of a chunk is made again in the backward pass.
    sums = [checkpoint(_cross_entropy, *part, use_reentrant=False) for part in parts]
    return torch.stack(sums).sum()


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


def _output_head(model: Any) -> torch.nn.Module:
    """Returns the layer that makes logits, inside whatever wraps the model."""
    from accelerate.utils import extract_model_from_parallel

    head = extract_model_from_parallel(model, keep_torch_compile=False).get_output_embeddings()
    assert isinstance(head, torch.nn.Module)
    return head


@contextmanager
def _head_at(head: torch.nn.Module, bears_BT: torch.Tensor) -> Iterator[None]:
    """Within this context the head sees only the tokens that bear loss.

    The last token of a row is left out, as it predicts none; virtual tokens before a row are too.
    Every family calls its head with ``(B, T, H)``, so this needs no argument that only some know.
    """
    tokens = bears_BT.shape[1] + 1

    def select(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_BTH, *rest = given
        return (hidden_BTH[:, -tokens:-1][bears_BT][None], *rest)

    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()
