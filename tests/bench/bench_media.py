"""How long a training step waits for its media: photos, 12-megapixel photos, videos.

    python tests/bench/bench_media.py --data DIR                      # every workload
    python tests/bench/bench_media.py large --set finetune.workers=1
    python tests/bench/bench_media.py large --memory-mib 1 --set finetune.pixels_gib=5

DIR holds `coco_captions_mini/` and `video_clips/`. Each run trains a LLaVA for 224-px images whose
step is very short (two layers of width 64), LoRA on all towers, so pixels are needed at
every step; three epochs, two questions per medium. `--memory-mib` bounds what is kept in memory,
as a larger data set would.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORKLOADS = {
    "photos": "79 COCO photos of about 640x480",
    "large": "48 photos of 4000x3000, COCO's enlarged",
    "video": "5 clips of 1 to 10 s, eight frames each",
}
EPOCHS, ROWS_PER_STEP = 3, 4


def make_model(folder: Path) -> None:
    """Writes a LLaVA of two layers of width 64 per tower, for 224-px images, with random weights."""
    import importlib.util

    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    spec = importlib.util.spec_from_file_location("make_base", ROOT / "data" / "make_base.py")
    assert spec is not None and spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    maker.IMAGE_PX, maker.PATCH_PX = 224, 32
    tokenizer = maker.make_tokenizer()
    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = LlamaConfig(
        vocab_size=4096, num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **small,
    )  # fmt: skip
    vision = CLIPVisionConfig(image_size=224, patch_size=32, **small)
    processor = maker.make_processor(tokenizer)
    processor.save_pretrained(folder)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=processor.image_token_id)
    LlavaForConditionalGeneration(config).save_pretrained(folder)


def make_rows(folder: Path, workload: str, data: Path | None) -> list[dict[str, Any]]:
    """Returns question, answer and medium of every row, and writes the media."""
    from PIL import Image

    if data is None:
        raise SystemExit("give --data, the folder of the data sets")
    media = folder / "media"
    media.mkdir()
    photos = sorted((data / "coco_captions_mini").rglob("*.jpg"))
    clips = [clip for clip in sorted((data / "video_clips").glob("*.*")) if clip.suffix in (".mp4", ".avi", ".mkv")]
    if workload == "large":
        for photo in photos[:48]:
            large = Image.open(photo).convert("RGB").resize((4000, 3000), Image.Resampling.BICUBIC)
            large.save(media / photo.name, quality=90)
    else:
        for file in photos if workload == "photos" else clips:
            if file.stem != "corrupted":
                shutil.copy(file, media)
    names = sorted(path.name for path in media.iterdir())
    kind = "video" if workload == "video" else "image"
    return [
        {"q": question, "a": answer, kind: name}
        for name in names
        for question, answer in (("how many digits", "three"), ("which colour is left", "red"))
    ]


def recipe_of(folder: Path, rows: list[dict[str, Any]], kind: str) -> Path:
    """Writes rows and recipe; returns the recipe's path."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {
        "id": "rows",
        "reader": "table",
        "path": str(folder / "rows.jsonl"),
        "columns": {"question": "q", "answer": "a", kind: kind},
        f"{kind}s": str(folder / "media"),
        "template": "vqa_plain",
    }
    finetune = {
        "lora": {"r": 8},
        "train": ["llm", "projector", "vision"],
        "epochs": EPOCHS,
        "batch_rows": ROWS_PER_STEP,
        "batch_tokens": 65536,
        "log_every": -(-len(rows) // ROWS_PER_STEP),
        "precision": "fp32",
    }
    path = folder / "recipe.json"
    recipe = {"run_dir": str(folder / "run"), "model": {"path": str(folder / "model")}, "sources": [source]}
    sections = {"build": {"templates": "first"}, "tokenize": {"max_length": 4096}, "finetune": finetune}
    path.write_text(json.dumps(recipe | sections))
    return path


def main() -> None:
    """Prints rows per second by epoch, the share of waiting and the versions."""
    import torch
    import transformers

    from mmtune.encoding.collate import Collator
    from mmtune.recipe.text import load_recipe
    from mmtune.stages.build_data import build_data
    from mmtune.stages.finetune import finetune
    from mmtune.stages.tokenize import tokenize
    from mmtune.storage import read_manifest
    from mmtune.talk import Talk

    parser = argparse.ArgumentParser()
    parser.add_argument("workloads", nargs="*", choices=[[], *WORKLOADS], default=[])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--memory-mib", type=int)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    asked = parser.parse_args()
    if asked.memory_mib is not None:
        Collator.__init__.__kwdefaults__["cache_bytes"] = asked.memory_mib << 20
    for workload in asked.workloads or WORKLOADS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_model(folder / "model")
            rows = make_rows(folder, workload, asked.data)
            path = recipe_of(folder, rows, "video" if workload == "video" else "image")
            recipe, talk = load_recipe(path, asked.overrides, {}), Talk(quiet=True)
            build_data(recipe, console=talk)
            tokenize(recipe, console=talk)
            began = os.times()
            result = finetune(recipe, console=talk)
            processor = sum(os.times()[:4]) - sum(began[:4])
            timings = read_manifest(folder / "run" / "adapter").timings
            lines = [
                json.loads(line) for line in (folder / "run" / "adapter" / "metrics.jsonl").read_text().splitlines()
            ]
        speeds = ", ".join(f"{line['rows_per_second']:.1f}" for line in lines if "rows_per_second" in line)
        print(f"{workload} ({WORKLOADS[workload]}), {' '.join(asked.overrides) or 'defaults'}")
        print(
            f"  rows/s by epoch {speeds}; waiting {result['wait_share']:.1%} of the steps;"
            f" the stage took {timings['total_seconds']:.1f} s, {processor:.1f} s of processor time"
        )
    print(
        f"Python {platform.python_version()}, torch {torch.__version__} with {torch.get_num_threads()} threads,"
        f" transformers {transformers.__version__}; {platform.machine()}, {os.cpu_count()} cores,"
        f" load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
