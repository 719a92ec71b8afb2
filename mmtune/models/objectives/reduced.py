"""Features reduced to the codes of an autoencoder that is trained on them.

Shapes: R rows, K kinds, D width of a kind's features, C width of the code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from mmtune.models.objectives.autoencoder import Autoencoder

_BATCH_ROWS, _RATE = 256, 1e-2
_ROWS_AT_ONCE = 8192


def reduce_by_autoencoder(
    features: Mapping[str, torch.Tensor],
    present_RK: torch.Tensor,
    train_R: torch.Tensor,
    *,
    width: int,
    inner_width: int | None,
    steps: int,
    seed: int,
    advance: Callable[[int], None] = lambda steps: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the codes of all rows ``(R, C)``, and what they are decoded to, ``(R, sum of D)``, kinds side by side.

    Adam under a one-cycle rate; what is lost of each kind weighs the same. The same numbers for the same seed.

    Args:
        features: Kind to ``(R, D)`` about their mean, of variance 1 over all numbers of a vector together.
        present_RK: Bool, what a row has.
        train_R: Bool, the rows to train on.
        width: C.
        inner_width: Of one hidden layer each way; None for the linear autoencoder.
        steps: Batches of 256 rows.
        seed: Of weights and batches.
        advance: Told of steps that are done.

    Raises:
        RecipeError: The code is wider than the features.
    """
    # Numbers of size 1 suit the layers' own start.
    scaled = {kind: (own * own.shape[1] ** 0.5).float() for kind, own in features.items()}
    widths = {kind: own.shape[1] for kind, own in features.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Autoencoder(widths, width, inner_width)
    generator = torch.Generator().manual_seed(seed)
    rows = train_R.nonzero().squeeze(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (_BATCH_ROWS,), generator=generator)]
        losses = model.losses({kind: own[batch] for kind, own in scaled.items()}, present_RK[batch])
        optimizer.zero_grad()
        torch.stack([loss / widths[kind] for kind, loss in losses.items()]).sum().backward()
        optimizer.step()
        schedule.step()
        advance(1)
    return _applied(model, scaled, present_RK)


@torch.no_grad()
def _applied(
    model: Autoencoder, scaled: Mapping[str, torch.Tensor], present_RK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    codes, decoded = [], []
    for start in range(0, len(present_RK), _ROWS_AT_ONCE):
        own = slice(start, start + _ROWS_AT_ONCE)
        codes.append(model.reduce({kind: values[own] for kind, values in scaled.items()}, present_RK[own]))
        made = model.decode(codes[-1])
        decoded.append(torch.cat([made[kind] / values.shape[1] ** 0.5 for kind, values in scaled.items()], dim=1))
    return torch.cat(codes), torch.cat(decoded)
