"""extract with a CLIP-base-sized image encoder of random weights: what share of the time the encoder itself takes.

    python tests/bench/bench_extract.py --images DIR                # 1,000 photographs of DIR, patches of 32 pixels
    python tests/bench/bench_extract.py --images DIR --patch 16     # four times the work per image
    python tests/bench/bench_extract.py --again 10000               # a second run over unchanged files
    python tests/bench/bench_extract.py --neighbours 100000         # exact search: as many queries as vectors
    python tests/bench/bench_extract.py --exemplars 100000          # build-data's retrieval over as many rows

Photographs are repeated under other names until there are enough. The share counts everything between the first file
and the last part on disk: starting processes, decoding, hashing, writing. Wanted: at least 85 %.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
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


def bench_again(count: int) -> None:
    """Prints what the command takes to find that the features of small images are there, and with one file changed."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        (top / "media").mkdir()
        pixels = np.random.default_rng(0).integers(0, 255, (count, 12, 16, 3), np.uint8)
        for number, own in enumerate(pixels):
            Image.fromarray(own).save(top / "media" / f"{number:06}.png")
        small = {"hidden_size": 32, "num_hidden_layers": 1}
        recipe = {
            "run_dir": "run",
            "sources": [{"id": "p", "reader": "folder", "path": "media", "columns": {"label": r"(\d)"}}],
            "extract": {"encoders": {"image": {"config": small}}, "tokens": False},
        }
        (top / "recipe.yaml").write_text(json.dumps(recipe))
        for what in ("first run", "again", "one file changed", "again"):
            if what == "one file changed":
                Image.fromarray(255 - pixels[0]).save(top / "media" / "000000.png")
            wall, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [sys.executable, "-m", "mmtune", "extract", str(top / "recipe.yaml"), "--json"]
            made = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            after, kept = resource.getrusage(resource.RUSAGE_CHILDREN), json.loads(made.stdout)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            said = "nothing to do" if kept["cached"] else f"{kept['kept']['image']:,} kept"
            print(f"{what}: {said}, {time.monotonic() - wall:.1f} s, {cpu:.1f} s of processor time")
        print(f"{count:,} images; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


def bench_neighbours(count: int) -> None:
    """Prints the time of an exact search of every vector of a pool among all of it."""
    rng = np.random.default_rng(0)
    for width in (64, 128):
        pool = rng.normal(size=(count, width)).astype(np.float32)
        wall, cpu = time.monotonic(), time.process_time()
        nearest(pool, pool, 10)
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        print(f"{count} queries over {count} vectors of {width}: {wall:.1f} s, {cpu:.1f} s of processor time")


def bench_exemplars(count: int, width: int = 64, shots: int = 4) -> None:
    """Prints the time in which every training row of a pool finds its exemplars among all of it, as build-data does."""
    from mmtune.features.table import Row, record_batch
    from mmtune.features.units import Unit, text_id
    from mmtune.media.known import MediaPlace
    from mmtune.prompts.chunk import Chunk
    from mmtune.records import Record
    from mmtune.stages.build_data.exemplars import NearExemplars, pools_of
    from mmtune.storage import Manifest, SplitWriter, finish_split

    vectors = np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)
    rows = [Record(f"s/{at}", "s", "vqa", "train", text=f"question {at}", target=str(at % 9)) for at in range(count)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "features"
        units = [Unit("text", text_id(row.text), "") for row in rows]
        made = [Row(unit, "", None, vector) for unit, vector in zip(units, vectors, strict=True)]
        batch = record_batch(made, {unit.id: ["train"] for unit in units}, None)
        writer = SplitWriter(folder / "text" / "shard-00000.arrow", batch.schema)
        writer.write_batch(batch)
        writer.close()
        finish_split(folder / "text", batch.schema)
        index = {"index": {"kind": "exact", "metric": "cosine"}}
        manifest = Manifest("extract", "", config=index, rows={"text": count}, facts={"media_root": "/"})
        exemplars = {"method": "retrieval", "k": shots, "balance": True}
        recipe = Recipe(run_dir=name, build={"exemplars": exemplars})
        place = MediaPlace({}, {})
        wall, cpu = time.monotonic(), time.process_time()
        near = NearExemplars(recipe, pools_of(recipe.build, {"s": tuple(rows)}), manifest, {"s": place}, "/")
        opened = time.monotonic() - wall
        chunks = (Chunk(0, "train", place, tuple(rows[at : at + 256])) for at in range(0, count, 256))
        found = sum(len(own) for chunk in near.attach(chunks) for own in (chunk.exemplars or {}).values())
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    print(
        f"{count} rows, {found} exemplars of {count} vectors of {width}: {wall:.1f} s ({opened:.1f} s to open),"
        f" {cpu:.1f} s of processor time"
    )


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of photographs")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--patch", type=int, default=32)
    parser.add_argument("--again", type=int, help="number of small images")
    parser.add_argument("--neighbours", type=int)
    parser.add_argument("--exemplars", type=int)
    asked = parser.parse_args()
    if asked.images:
        bench_images(asked.images, asked.count, asked.patch)
    if asked.again:
        bench_again(asked.again)
    if asked.neighbours:
        bench_neighbours(asked.neighbours)
    if asked.exemplars:
        bench_exemplars(asked.exemplars)


if __name__ == "__main__":
    main()
