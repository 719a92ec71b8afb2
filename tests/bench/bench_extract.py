"""extract with a CLIP-base-sized image encoder of random weights: what share of the time the encoder itself takes.

    python tests/bench/bench_extract.py --images DIR                # 448 photographs of DIR, patches of 32 pixels
    python tests/bench/bench_extract.py --images DIR --patch 16     # four times the work per image
    python tests/bench/bench_extract.py --neighbours 100000         # exact search: as many queries as vectors

Photographs are repeated under other names until there are enough. The share counts everything between the first file
and the last part on disk: starting processes, decoding, hashing, writing. Wanted: at least 85 %.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from mmtune.features.neighbours import nearest
from mmtune.recipe import Recipe
from mmtune.storage import read_manifest
from mmtune.talk import Talk


def write_clip(folder: Path, patch: int) -> None:
    """Writes CLIP's base vision tower with random weights, and its processor."""
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    CLIPVisionModel(CLIPVisionConfig(patch_size=patch)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}).save_pretrained(folder)


def bench_images(source: Path, count: int, patch: int) -> None:
    """Prints rows per second and the encoder's share of a first run, and the time of a second one."""
    from mmtune.stages.extract import extract

    photographs = sorted(file for suffix in ("*.jpg", "*.png") for file in source.rglob(suffix))
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        (top / "media").mkdir()
        for number in range(count):
            file = photographs[number % len(photographs)]
            shutil.copy(file, top / "media" / f"{number:05}{file.suffix}")
        write_clip(top / "clip", patch)
        recipe = Recipe(
            run_dir=top / "run",
            sources=[{"id": "p", "reader": "folder", "path": str(top / "media"), "columns": {"label": r"(\d)"}}],
            extract={"encoders": {"image": str(top / "clip")}},
        )
        extract(recipe, console=Talk())
        seconds = read_manifest(top / "run" / "features").timings
        whole, encoder = seconds["image_seconds"], seconds["image_encoder_seconds"]
        print(f"{count} images, patch {patch}: {count / whole:.1f} rows/s, {encoder / whole:.1%} in the encoder")
        started = time.monotonic()
        extract(recipe, console=Talk(quiet=True))
        print(f"again: {time.monotonic() - started:.2f} s; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


def bench_neighbours(count: int) -> None:
    """Prints the time of an exact search of every vector of a pool among all of it."""
    rng = np.random.default_rng(0)
    for width in (64, 128):
        pool = rng.normal(size=(count, width)).astype(np.float32)
        wall, cpu = time.monotonic(), time.process_time()
        nearest(pool, pool, 10)
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        print(f"{count} queries over {count} vectors of {width}: {wall:.1f} s, {cpu:.1f} s of processor time")


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of photographs")
    parser.add_argument("--count", type=int, default=448)
    parser.add_argument("--patch", type=int, default=32)
    parser.add_argument("--neighbours", type=int)
    asked = parser.parse_args()
    if asked.images:
        bench_images(asked.images, asked.count, asked.patch)
    if asked.neighbours:
        bench_neighbours(asked.neighbours)


if __name__ == "__main__":
    main()
