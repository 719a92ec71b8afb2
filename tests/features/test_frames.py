"""Time positions of video frames: reversing changes the tokens, never the pooled vector."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.features.frames import clip_features
from mmtune.models.fusion.time_positions import time_waves


def times(seconds, width):
    return time_waves(torch.tensor(seconds), width).numpy()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(3, 40))
def test_reversed_frames_have_other_tokens_and_the_same_mean(seed, count, width):
    frames = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    seconds = [0.4 * at for at in range(count)]
    tokens, pooled = clip_features(frames, times(seconds, width))
    turned, same = clip_features(frames[::-1].copy(), times(seconds, width))
    np.testing.assert_allclose(pooled, same, atol=1e-6)
    np.testing.assert_allclose(pooled, frames.mean(0), atol=1e-6)
    # Not even as a set: a frame knows when it is shown.
    assert np.abs(turned[::-1] - tokens).max() > 1e-3


def test_times_are_as_loud_as_the_frames():
    frames = np.full((3, 8), 100.0, np.float32)
    tokens, _ = clip_features(frames, times([0.0, 1.0, 2.0], 8))
    assert 50 < np.sqrt(np.mean((tokens - frames) ** 2)) < 150
