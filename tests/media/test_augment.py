"""Images change by shifts and mirrors alone, drawn from seed, step and image."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmtune.media.augment import Augmentation

FLIPS = st.sampled_from([(), ("horizontal",), ("vertical",), ("horizontal", "vertical")])


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@given(st.integers(1, 20), st.integers(1, 20), st.floats(0, 0.5), FLIPS, st.integers(0, 50))
def test_it_is_a_shifted_mirror_of_the_image(
    width: int, height: int, shift: float, flips: tuple[str, ...], step: int
) -> None:
    image = picture(width, height)
    pixels = np.asarray(image)
    made = np.asarray(Augmentation(1, shift, flips)(image, "a.png", step))
    y, x = int(shift * height), int(shift * width)
    mirrors = [pixels]
    mirrors += [m[:, ::-1] for m in mirrors] if "horizontal" in flips else []
    mirrors += [m[::-1] for m in mirrors] if "vertical" in flips else []
    padded = [np.pad(m, ((y, y), (x, x), (0, 0)), mode="edge") for m in mirrors]
    windows = (p[i : i + height, j : j + width] for p in padded for i in range(2 * y + 1) for j in range(2 * x + 1))
    assert any(np.array_equal(made, window) for window in windows)


def test_all_moves_and_mirrors_are_drawn() -> None:
    image, change = picture(10, 10), Augmentation(0, 0.1, ("horizontal", "vertical"))
    assert len({change(image, "a.png", step).tobytes() for step in range(600)}) == 3 * 3 * 4


def test_seed_step_and_name_decide() -> None:
    image, change = picture(40, 40), Augmentation(0, 0.5)
    first = change(image, "a.png", 3).tobytes()
    assert change(image, "a.png", 3).tobytes() == first
    assert Augmentation(0, 0.5)(image, "a.png", 3).tobytes() == first
    others = [Augmentation(1, 0.5)(image, "a.png", 3), change(image, "b.png", 3), change(image, "a.png", 4)]
    assert first not in [other.tobytes() for other in others]


def test_nothing_asked_changes_nothing() -> None:
    image = picture(9, 7)
    assert Augmentation(5)(image, "a.png", 1).tobytes() == image.tobytes()
