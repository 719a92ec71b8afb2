"""What is said of a model whose numbers are none: its answers mean nothing, so that nothing is made of them."""

from __future__ import annotations

import numpy as np

from mmtune.errors import IntegrityError


def refuse_nan(model: str, what: str, values: np.ndarray) -> None:
    """Raises IntegrityError where a model's numbers are none.

    Args:
        model: Its name; empty for the only one.
        what: What the numbers are, such as probabilities.
        values: ``(R,)`` or ``(R, ...)``, of R rows.
    """
    bad = int(np.isnan(values).reshape(len(values), -1).any(1).sum()) if values.size else 0
    if bad:
        raise IntegrityError(
            f"{model or 'the model'} gives {what} that are no numbers for {bad:,} of {len(values):,} rows: "
            "its weights are damaged, or its training diverged",
            "fetch the model again, or tune it again: mmtune finetune --force",
            "not_finite",
        )
