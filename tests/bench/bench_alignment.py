"""What the adversarial game does to codes: recipes/represent.yaml's pretraining with and without it, on held-out rows.

    python tests/bench/bench_alignment.py [--seeds 0,1] [--set pretrain.max_steps=300]

One line per run, over the test rows of the recipe (scans and voices of their own):

- ``player``: codes that the discriminator of the run tells apart, of a hundred;
- ``fresh``: those that a new discriminator tells apart, which studied the finished codes of the training rows for
  1,500 steps. The game hides a modality from its opponent; this says what it erased;
- ``probe``: digits that logistic regression on the codes of training rows reads, by modality (rows of ``twin``);
- ``recall``: codes whose nearest one of the other modality, by cosine, is of the same digit (rows of ``twin``).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mmtune.encoding.collate import Collator  # noqa: E402
from mmtune.encoding.processor import load_processor  # noqa: E402
from mmtune.models.load import load_model  # noqa: E402
from mmtune.models.objectives.adversarial import Discriminator, discriminator_loss, game_facts  # noqa: E402
from mmtune.order import pretrain_stages, run_stages  # noqa: E402
from mmtune.recipe import Recipe  # noqa: E402
from mmtune.recipe.text import load_recipe  # noqa: E402
from mmtune.stages.build_data import build_data  # noqa: E402
from mmtune.storage import open_split, read_manifest  # noqa: E402
from mmtune.talk import Talk  # noqa: E402
from mmtune.training.batching import Split, rows_apart  # noqa: E402
from mmtune.training.heads import codes_of, load_heads  # noqa: E402
from mmtune.training.learner import Learner  # noqa: E402

Codes = dict[str, torch.Tensor]
PARTS = ("image", "audio")
ROWS, STEPS, BATCH = 64, 1500, 256


def codes_of_split(recipe: Recipe, learner: Learner, split: str) -> tuple[Codes, list[str]]:
    """Returns ``(N, C)`` by part and the digit of every row, "" where the row has two."""
    base, table = recipe.run_dir / "base", open_split(recipe.run_dir / "tokens" / split)
    root = Path(read_manifest(recipe.run_dir / "tokens").facts["media_root"])
    course = {"batch_tokens": 10**6, "batch_rows": ROWS, "seed": 0, "micro_batches": 1, "epochs": 1.0}
    rows = rows_apart(Split(table, Collator(load_processor(str(base)), media_root=root)), course).batches
    units = [range(first, min(first + ROWS, table.num_rows)) for first in range(0, table.num_rows, ROWS)]
    made = [codes_of(learner, rows.batch(some)) for some in units]
    examples = {row["id"]: row for row in open_split(recipe.run_dir / "instructions" / split).to_pylist()}
    found = [examples[name] for name in rows.ids(range(table.num_rows))]
    digits = [row["references"][0] if row["source"] == "twin" else "" for row in found]
    return {part: torch.cat([own[part] for own in made]) for part in PARTS}, digits


def told_apart(discriminator: torch.nn.Module, codes: Codes) -> float:
    """Returns the share of codes whose part is named, both parts with the same weight."""
    codes_NC = torch.cat([codes[part] for part in PARTS])
    part_N = torch.arange(2).repeat_interleave(len(codes["image"]))
    with torch.no_grad():
        return game_facts(discriminator(codes_NC), part_N, codes_NC, PARTS).accuracy


def fresh(codes: Codes) -> torch.nn.Module:
    """Returns a discriminator that studied finished codes."""
    torch.manual_seed(0)
    codes_NC = torch.cat([codes[part] for part in PARTS])
    part_N = torch.arange(2).repeat_interleave(len(codes["image"]))
    made = Discriminator(codes_NC.shape[1], 2)
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        some = torch.randint(len(codes_NC), (BATCH,))
        optimizer.zero_grad()
        discriminator_loss(made(codes_NC[some]), part_N[some]).backward()
        optimizer.step()
        schedule.step()
    return made


def figures(learner: Learner, known: tuple[Codes, list[str]], held_out: tuple[Codes, list[str]]) -> dict[str, Any]:
    """Returns the figures of a run, in 100."""
    game = learner.heads["codes"].game
    found: dict[str, Any] = {"player": None if game is None else told_apart(game.discriminator, held_out[0])}
    found["fresh"] = told_apart(fresh(known[0]), held_out[0])
    twins = [np.array([digit != "" for digit in digits]) for _, digits in (known, held_out)]
    seen, asked = (np.array(digits)[own] for (_, digits), own in zip((known, held_out), twins, strict=True))
    for part in PARTS:
        probe = LogisticRegression(max_iter=5000).fit(known[0][part][twins[0]].numpy(), seen)
        found[f"probe_{part}"] = probe.score(held_out[0][part][twins[1]].numpy(), asked)
    sides = [functional.normalize(held_out[0][part][twins[1]], dim=-1) for part in PARTS]
    cosines = (sides[0] @ sides[1].T).numpy()
    found["recall_image_audio"] = (asked[cosines.argmax(1)] == asked).mean()
    found["recall_audio_image"] = (asked[cosines.argmax(0)] == asked).mean()
    return {name: value if value is None else round(100 * float(value), 1) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--games", default="with,without")
    parser.add_argument("--set", action="append", default=[], help="override a key of the recipe")
    given, quiet = parser.parse_args(), Talk(quiet=True)
    for seed in given.seeds.split(","):
        for game in given.games.split(","):
            with tempfile.TemporaryDirectory() as folder:
                off = [] if game == "with" else ["pretrain.objectives.adversarial=0"]
                changes = [*given.set, *off, f"run_dir={folder}", f"seed={seed}"]
                recipe = load_recipe(ROOT / "recipes" / "represent.yaml", changes)
                build_data(recipe, console=quiet)
                stages, started = pretrain_stages(recipe, None, "never", True), time.process_time()
                run_stages(recipe, stages, force=False, dry_run=False, console=quiet)
                seconds = time.process_time() - started
                base = recipe.run_dir / "base"
                learner = load_heads(load_model(str(base)), base)
                splits = [codes_of_split(recipe, learner, split) for split in ("train", "test")]
                made = figures(learner, *splits)
            print(json.dumps({"game": game, "seed": int(seed), **made, "cpu_seconds": round(seconds)}), flush=True)


if __name__ == "__main__":
    main()
