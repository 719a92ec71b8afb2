"""The frames of a video as tokens that know their time.

Shapes: T frames, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def clip_features(
    frames: NDArray[np.float32], seconds: Sequence[float]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns a video's tokens ``(T, D)`` and its pooled vector ``(D,)``.

    A token is a frame's own vector plus the sines and cosines of its second (Vaswani et al. 2017, arXiv:1706.03762),
    as loud as the frames are on average. The pooled vector is the mean of the frames without their times, so that it
    does not depend on their order.

    Args:
        frames: The frames' pooled vectors ``(T, D)``.
        seconds: When each frame is shown.
    """
    loudness = np.sqrt(np.mean(np.square(frames, dtype=np.float64)) * 2)
    tokens = frames + (loudness * time_positions(seconds, frames.shape[1])).astype(np.float32)
    return tokens, frames.mean(axis=0, dtype=np.float64).astype(np.float32)


def time_positions(seconds: Sequence[float], width: int) -> NDArray[np.float64]:
    """Returns ``(T, width)``: sines, then cosines, with periods from 2 pi to 20,000 pi seconds."""
    half = (width + 1) // 2
    scale = 10_000.0 ** (-np.arange(half) / max(half - 1, 1))
    angles = np.asarray(seconds, np.float64)[:, None] * scale
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :width]
