"""Codes stand for the very floats of a processor; what has too many values stays as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from mmtune.features.levels import Coded, coded, decoded, read_values, to_tensors

MEAN, STD = np.float32([0.4815, 0.4578, 0.4082]), np.float32([0.2686, 0.2613, 0.2758])


def processed(seed: int, rows: int, side: int, brightest: int = 256) -> torch.Tensor:
    pixels = np.random.default_rng(seed).integers(0, brightest, (rows, side, side, 3))
    return torch.from_numpy(((pixels.astype(np.float32) / 255 - MEAN) / STD).transpose(0, 3, 1, 2).copy())


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 256)), min_size=1, max_size=4), st.booleans())
def test_rows_come_back_to_the_last_bit(tmp_path_factory: Any, shapes: list[tuple[int, int]], patches: bool) -> None:
    images = [processed(seed, rows, 8, brightest) for seed, (rows, brightest) in enumerate(shapes)]
    images = [image.flatten(1) for image in images] if patches else images
    codes = [coded(image) for image in images]
    assert all(isinstance(one, Coded) and one.codes.dtype == np.uint8 for one in codes)
    tensors = to_tensors("pixel_values", codes)
    assert tensors["pixel_values"].dtype == torch.uint8
    path = tmp_path_factory.mktemp("levels") / "a.safetensors"
    save_file(tensors, path)
    with safe_open(path, "pt") as file:
        at = 0
        for image in images:
            found = read_values(file, slice(at, at + len(image)))
            assert set(found) == {"pixel_values"} and torch.equal(found["pixel_values"], image)
            at += len(image)


def test_what_has_no_levels_stays_as_it_is() -> None:
    many = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 20, 20)).astype(np.float32))
    holes = torch.full((1, 3, 2, 2), float("nan"))
    for value in (many, holes, torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 4), torch.zeros(2)):
        assert coded(value) is value
    few = processed(0, 1, 20)
    found = to_tensors("p", [coded(few), coded(many)])
    assert set(found) == {"p"} and torch.equal(found["p"], torch.cat([few, many]))
    # Each has few values, both together too many.
    other = few + 1e-4
    found = to_tensors("p", [coded(few), coded(other)])
    assert set(found) == {"p"} and torch.equal(found["p"], torch.cat([few, other]))
    assert isinstance(coded(other), Coded)


def test_codes_take_a_quarter() -> None:
    image = processed(0, 1, 64)
    one = coded(image)
    assert isinstance(one, Coded) and 4 * one.codes.nbytes == image.nbytes
    assert torch.equal(decoded(one.codes, one.levels), image)
