"""Images changed a little while training: shifted and mirrored, never resized.

What is drawn depends on the seed, the training step and the image alone, so a resumed run, other
workers or another number of processes show the same pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How images may change.

    Attributes:
        seed: Seed of the run.
        shift: Longest move along each side, as a share of it; the edge's pixels fill what comes free.
        flips: ``horizontal`` mirrors half of the images left to right, ``vertical`` half of them top to bottom.
    """

    seed: int
    shift: float = 0.0
    flips: tuple[str, ...] = ()

    def __call__(self, image: Image.Image, key: str, step: int) -> Image.Image:
        """Returns the RGB image as it is shown at one step; its size stays the same.

        Args:
            image: As decoded.
            key: Names the image; the same one is changed the same way within a step.
            step: Training step.
        """
        from PIL import Image

        name = int.from_bytes(blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")
        move_y, move_x, *mirror = np.random.default_rng([self.seed, step, name]).random(4)
        pixels = np.asarray(image)
        pixels = _moved(pixels, 0, move_y, self.shift, mirror[0] < 0.5 and "vertical" in self.flips)
        pixels = _moved(pixels, 1, move_x, self.shift, mirror[1] < 0.5 and "horizontal" in self.flips)
        return Image.fromarray(np.ascontiguousarray(pixels))


def _moved(pixels: np.ndarray, axis: int, draw: float, share: float, mirrored: bool) -> np.ndarray:
    size = pixels.shape[axis]
    most = int(share * size)
    at = np.arange(size) + round((2 * draw - 1) * most)
    at = np.clip(at[::-1] if mirrored else at, 0, size - 1)
    return np.take(pixels, at, axis=axis)
