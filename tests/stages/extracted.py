"""Pictures on disk, and what extract makes of them."""

from pathlib import Path

import numpy as np
from PIL import Image

from mmtune.recipe import Recipe
from mmtune.stages.extract import extract
from mmtune.talk import Talk

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
BUILT = {
    "image": {"config": SMALL},
    "audio": {"config": {**SMALL, "sampling_rate": 8000, "num_mel_bins": 40}},
    "behaviour": {"config": {**SMALL, "window": 4}},
}


def picture(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def pictures(folder: Path, count: int = 12) -> Path:
    for number in range(count):
        picture(folder / "a" / f"{number:02}.png", number)
    return folder


def recipe(tmp_path: Path, folder: Path, **settings) -> Recipe:
    source = {"id": "f", "reader": "folder", "split": "train", "path": str(folder)}
    return Recipe(
        run_dir=tmp_path / "run",
        sources=[source],
        extract={"encoders": BUILT, "batch_rows": 4, "workers": 1, **settings},
    )


def run(asked: Recipe, **options) -> tuple[dict, Path]:
    return extract(asked, console=Talk(quiet=True), **options), asked.run_dir / "features"
