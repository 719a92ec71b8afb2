"""The frames of a video as tokens that know their time.

Shapes: T frames, D width.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def clip_features(
    frames: NDArray[np.float32], times: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns a video's tokens ``(T, D)`` and its pooled vector ``(D,)``.

    A token is a frame's own vector plus what tells its second, as loud as the frames are on average. The pooled vector
    is the mean of the frames without their times, so that it does not depend on their order.

    Args:
        frames: The frames' pooled vectors ``(T, D)``.
        times: Sines and cosines of when each frame is shown ``(T, D)``.
    """
    loudness = np.sqrt(np.mean(np.square(frames, dtype=np.float64)) * 2)
    tokens = frames + (loudness * times).astype(np.float32)
    return tokens, frames.mean(axis=0, dtype=np.float64).astype(np.float32)
