"""Peak memory of LoRA where a frozen vision tower runs at every step, where its features are made, and without it.

    python tests/bench/bench_left_out.py
    python tests/bench/bench_left_out.py --layers 24 --images 40

The model is a LLaVA with random weights whose tower has about 12.6 M parameters per layer (152 M in all by default)
beside a small language model; each run is a process of its own and says the most memory it held (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# In turns; the third finds what the second proved.
RUNS = {"without features": "off", "making them": "on", "with those of the run before": "on"}


def make_model(folder: Path, layers: int) -> int:
    """Writes the model and its processor; returns the parameters of the tower."""
    import importlib.util

    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    spec = importlib.util.spec_from_file_location("make_base", ROOT / "data" / "make_base.py")
    assert spec is not None and spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    maker.IMAGE_PX, maker.PATCH_PX = 224, 16
    tokenizer = maker.make_tokenizer()
    processor = maker.make_processor(tokenizer)
    processor.save_pretrained(folder)
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=16, image_size=224,
        patch_size=16,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=processor.image_token_id)
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    return sum(weight.numel() for name, weight in model.named_parameters() if "vision_tower" in name)


def make_recipe(folder: Path, images: int) -> Path:
    """Writes pictures, five questions about each, and the recipe; makes tokens/."""
    import numpy as np
    from PIL import Image

    from mmtune.recipe.text import load_recipe
    from mmtune.stages.build_data import build_data
    from mmtune.stages.tokenize import tokenize
    from mmtune.talk import Talk

    rows = []
    for number in range(images):
        noise = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((224, 224)).save(folder / f"{number}.jpg")
        rows += [{"q": f"how many {word}", "a": word, "image": f"{number}.jpg"} for word in "abcde"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"question": "q", "answer": "a", "image": "image"}
    source = {"id": "s", "reader": "table", "path": str(folder / "rows.jsonl"), "images": str(folder)}
    tuned = {"lora": {"r": 8}, "batch_rows": 5, "max_steps": 2 * images, "precision": "fp32"}
    settings = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(folder / "model")},
        "sources": [{**source, "columns": columns}],
        "finetune": tuned,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(settings))
    recipe = load_recipe(path, [], {})
    build_data(recipe, console=Talk(quiet=True))
    tokenize(recipe, console=Talk(quiet=True))
    return path


def train(path: str, use: str) -> None:
    """Tunes in this process and prints the most memory that it held, in MiB."""
    from mmtune.recipe.text import load_recipe
    from mmtune.stages.finetune import finetune
    from mmtune.talk import Talk

    recipe = load_recipe(Path(path), [f"finetune.features.use={use}"], {})
    finetune(recipe, force=True, console=Talk(quiet=True))
    # Of this program alone: what getrusage calls the most is handed down by the process that started it.
    (most,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    print(int(most) // 1024)


def main() -> None:
    """Runs the three one after the other and prints a line for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.train:
        train(*asked.train)
        return
    import torch
    import transformers

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = make_model(folder / "model", asked.layers)
        path = make_recipe(folder, asked.images)
        print(f"vision tower of {parameters / 1e6:.0f} M parameters, LoRA r=8, fp32, one thread")
        for label, use in RUNS.items():
            command = [sys.executable, __file__, "--train", str(path), use]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            print(f"{label}: {int(done.stdout.split()[-1]):,} MiB at its peak")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
