"""How much of a training step is neither forward, backward nor optimizer.

    python tests/bench/bench_finetune.py                     # the quickstart's recipe, its default batch
    python tests/bench/bench_finetune.py recipes/easy_vqa.yaml --set finetune.max_steps=100

Builds instructions/ and tokens/ of the recipe in a temporary folder and tunes there, once. The
first epoch decodes every picture, later ones find it in memory; both are in the share.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def main() -> None:
    """Prints the shares, the seconds by part and the versions."""
    import accelerate
    import peft
    import torch
    import transformers

    from mmtune.recipe.text import load_recipe
    from mmtune.stages.build_data import build_data
    from mmtune.stages.finetune import finetune
    from mmtune.stages.tokenize import tokenize
    from mmtune.storage import read_manifest
    from mmtune.talk import Talk

    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", nargs="?", type=Path, default=REPOSITORY / "recipes" / "quickstart.yaml")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(asked.recipe, [*asked.overrides, f"run_dir={folder}"], {})
        talk = Talk(quiet=True)
        build_data(recipe, console=talk)
        tokenize(recipe, console=talk)
        result = finetune(recipe, console=talk)
        timings = read_manifest(Path(folder) / "adapter").timings
    parts = {name.removesuffix("_seconds"): value for name, value in timings.items()}
    print(f"{asked.recipe.name}: {result['steps']} steps, loss {result['loss']:.4f}")
    print(f"outside forward, backward, optimizer: {result['overhead_share']:.1%} of a step")
    print(f"  of it waiting for data: {result['wait_share']:.1%}")
    print("  seconds: " + ", ".join(f"{name} {value}" for name, value in parts.items()))
    print(
        f"Python {platform.python_version()}, torch {torch.__version__} with {torch.get_num_threads()} threads,"
        f" transformers {transformers.__version__}, peft {peft.__version__}, accelerate {accelerate.__version__};"
        f" {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
