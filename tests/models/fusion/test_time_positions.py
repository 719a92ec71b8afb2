"""Times in seconds: order changes tokens, not their mean; padding changes nothing."""

import math

import torch

from mmtune.models.fusion.time_positions import TimePositions, sinusoids


def test_sinusoids_are_the_formula():
    found = sinusoids(torch.tensor([0.0, 0.3, 7.25]), 6, shortest=0.5, longest=50.0)
    waves = [0.5, 5.0, 50.0]
    for row, at in zip(found, (0.0, 0.3, 7.25), strict=True):
        turns = [2 * math.pi * at / wave for wave in waves]
        wanted = [math.sin(turn) for turn in turns] + [math.cos(turn) for turn in turns]
        torch.testing.assert_close(row, torch.tensor(wanted), rtol=1e-5, atol=1e-5)
    odd = sinusoids(torch.tensor([0.0, 0.3, 7.25]), 5, shortest=0.5, longest=50.0)
    torch.testing.assert_close(odd, found[:, :5])


def test_reversed_frames_change_tokens_but_not_the_mean():
    torch.manual_seed(0)
    positions = TimePositions(16)
    seconds, frames = torch.tensor([[0.0, 0.5, 1.0, 1.5]]), torch.randn(1, 4, 16)
    forward, backward = frames + positions(seconds), frames.flip(1) + positions(seconds)
    assert (forward - backward.flip(1)).abs().max() > 1e-2
    torch.testing.assert_close(forward.mean(1), backward.mean(1))


def test_the_same_second_is_the_same_position_at_any_frame_rate():
    positions = TimePositions(16)
    slow, fast = positions(torch.tensor([[0.0, 1.0, 2.0]])), positions(torch.tensor([[0.0, 0.5, 1.0, 1.5, 2.0]]))
    torch.testing.assert_close(slow, fast[:, ::2])
