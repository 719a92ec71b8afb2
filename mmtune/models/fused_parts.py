"""Parts of a model that run as one operation while it trains on a CPU; what checks it before step 1 runs them too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mmtune.models.decoder_block import fused_blocks
from mmtune.models.linear import fused_linears
from mmtune.models.rms_norm import fused_rms_norms
from mmtune.models.rotary import fused_rotary


@contextmanager
def fused_parts(model: nn.Module) -> Iterator[None]:
    """Within this context norms, rotary positions and halves of blocks are one operation each, where they can be.

    Linear layers multiply by ``products``.

    Args:
        model: With whatever wraps it; a context within another changes nothing.
    """
    with fused_rms_norms(model), fused_rotary(model), fused_blocks(model), fused_linears(model):
        yield
