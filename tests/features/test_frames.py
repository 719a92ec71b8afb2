"""Time positions of video frames: reversing changes the tokens, never the pooled vector."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.features.frames import clip_features, time_positions


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(1, 40))
def test_reversed_frames_have_other_tokens_and_the_same_mean(seed, count, width):
    frames = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    seconds = [0.4 * at for at in range(count)]
    tokens, pooled = clip_features(frames, seconds)
    turned, same = clip_features(frames[::-1].copy(), seconds)
    np.testing.assert_allclose(pooled, same, atol=1e-6)
    np.testing.assert_allclose(pooled, frames.mean(0), atol=1e-6)
    # Not even as a set: a frame knows when it is shown.
    assert np.abs(turned[::-1] - tokens).max() > 1e-3


def test_positions_are_sines_and_cosines_of_seconds():
    made = time_positions([0.0, 1.5], 4)
    np.testing.assert_allclose(made, [[0, 0, 1, 1], [np.sin(1.5), np.sin(1.5e-4), np.cos(1.5), np.cos(1.5e-4)]])
    assert time_positions([1.0], 5).shape == (1, 5)


def test_times_are_as_loud_as_the_frames():
    frames = np.full((3, 8), 100.0, np.float32)
    tokens, _ = clip_features(frames, [0, 1, 2])
    assert 50 < np.sqrt(np.mean((tokens - frames) ** 2)) < 150
