"""What the adversarial game does to codes: recipes/represent.yaml's pretraining with and without it, on held-out rows.

    python tests/bench/bench_alignment.py [--seeds 0,1] [--held-out val] [--set pretrain.max_steps=300]

The recipe's 160 held-out rows of ``twin`` show 149 pictures, too few for a difference of three points. So every scan
of the split stands alone in four new scenes, painted as those of ``data/scenes`` are, and is paired with voices of the
split: as many rows of ``agree`` as of ``twin``. ``--held-out val`` is for choosing settings.

One line per run, and one for the difference that the game makes, by a bootstrap over scans:

- ``player``: codes that the discriminator of the run tells apart, of a hundred;
- ``fresh``: those that a new discriminator tells apart, which studied the finished codes of the training rows for
  1,500 steps. The game hides a modality from its opponent; this says what it erased;
- ``probe``: digits that logistic regression on the codes of training rows reads, by modality (rows of ``twin``);
- ``recall``: codes whose nearest one of the other modality, by cosine, is of the same digit (rows of ``twin``).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "represent.yaml"
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import make_scenes  # noqa: E402
from make_pairs import QUESTIONS, sounds_by_digit  # noqa: E402

from mmtune.encoding.collate import Collator  # noqa: E402
from mmtune.encoding.processor import load_processor  # noqa: E402
from mmtune.evaluation.intervals import paired_difference  # noqa: E402
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
Right = dict[str, np.ndarray]
PARTS = ("image", "audio")
ROWS, STEPS, BATCH = 64, 1500, 256
SCENES_PER_SCAN = 4
OF_SOUNDS = ("probe_audio", "recall_audio_image")


def paint_scans(split: str, folder: Path) -> dict[int, list[str]]:
    """Writes every scan of a split alone into scenes of drawn corner and colours, and returns their names by digit."""
    scans, classes = make_scenes.load_scans()
    draw, found = random.Random(f"alignment {split}"), dict[int, list[str]]()
    for digit, pool in make_scenes.split_scans(classes)[split].items():
        for scan in pool:
            for number in range(SCENES_PER_SCAN):
                ink, corner, paper = (
                    draw.choice(list(own)) for own in (make_scenes.INK, make_scenes.CORNERS, make_scenes.PAPER)
                )
                shown = (make_scenes.Digit(digit, scan, ink, corner),)
                found.setdefault(digit, []).append(f"{scan}_{number}.png")
                make_scenes.paint(make_scenes.Scene(0, paper, shown), scans).save(folder / found[digit][-1])
    return found


def held_out_sources(split: str, folder: Path) -> list[dict[str, Any]]:
    """Writes pairs of a split and returns their sources: every painted scene in ``twin``, as many rows of ``agree``."""
    folder.mkdir(parents=True)
    pictures, sounds, draw = paint_scans(split, folder), sounds_by_digit(split), random.Random(f"pairs {split}")
    twins = [(digit, digit, name) for digit, names in pictures.items() for name in names]
    pairs = [(number % 2, number // 2 % 2) for number in range(len(twins))]
    drawn = {"twin": twins, "agree": [(seen, heard, draw.choice(pictures[seen])) for seen, heard in pairs]}
    sources = []
    for kind, found in drawn.items():
        lines = []
        for number, (seen, heard, picture) in enumerate(found):
            answer = str(seen) if kind == "twin" else "yes" if seen == heard else "no"
            row = {"id": f"{split}/{number}", "question": QUESTIONS[kind], "answer": answer, "image": picture}
            lines.append(json.dumps(row | {"audio": draw.choice(sounds[heard])}) + "\n")
        (folder / f"{kind}.jsonl").write_text("".join(lines), "utf-8")
        columns = {"id": "id", "question": "question", "answer": "answer", "images": "image", "audio": "audio"}
        sources.append({"id": kind, "reader": "table", "split": split, "path": str(folder / f"{kind}.jsonl"),
                        "columns": columns, "images": str(folder), "audios": str(ROOT / "data" / "sounds" / split),
                        "template": "vqa_plain"})  # fmt: skip
    return sources


@dataclass(frozen=True)
class Coded:
    """Rows of a split.

    Attributes:
        codes: ``(N, C)`` by part.
        digits: ``(N,)`` of each row, "" where it has two.
        shown: ``(N,)`` by part: the scan and the recording that it shows.
    """

    codes: Codes
    digits: np.ndarray
    shown: dict[str, np.ndarray]


def codes_of_split(recipe: Recipe, learner: Learner, split: str) -> Coded:
    """Returns the codes of a split's rows by the standards that were measured in pretraining."""
    base, table = recipe.run_dir / "base", open_split(recipe.run_dir / "tokens" / split)
    root = Path(read_manifest(recipe.run_dir / "tokens").facts["media_root"])
    course = {"batch_tokens": 10**6, "batch_rows": ROWS, "seed": 0, "micro_batches": 1, "epochs": 1.0}
    rows = rows_apart(Split(table, Collator(load_processor(str(base)), media_root=root)), course).batches
    units = [range(first, min(first + ROWS, table.num_rows)) for first in range(0, table.num_rows, ROWS)]
    made = [codes_of(learner, rows.batch(some)) for some in units]
    examples = {row["id"]: row for row in open_split(recipe.run_dir / "instructions" / split).to_pylist()}
    found = [examples[name] for name in rows.ids(range(table.num_rows))]
    digits = np.array([row["references"][0] if row["source"] == "twin" else "" for row in found])
    shown = {
        "image": np.array([Path(row["images"][0]["path"]).stem.partition("_")[0] for row in found]),
        "audio": np.array([row["audios"][0]["path"] for row in found]),
    }
    return Coded({part: torch.cat([own[part] for own in made]) for part in PARTS}, digits, shown)


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


def right_answers(known: Coded, held_out: Coded) -> dict[str, np.ndarray]:
    """Returns ``(N,)`` which held-out rows of ``twin`` are right, by figure."""
    seen, asked = known.digits != "", held_out.digits != ""
    digits, found = held_out.digits[asked], dict[str, np.ndarray]()
    for part in PARTS:
        probe = LogisticRegression(max_iter=5000).fit(known.codes[part][seen].numpy(), known.digits[seen])
        found[f"probe_{part}"] = probe.predict(held_out.codes[part][asked].numpy()) == digits
    sides = [functional.normalize(held_out.codes[part][asked], dim=-1) for part in PARTS]
    cosines = (sides[0] @ sides[1].T).numpy()
    found["recall_image_audio"] = digits[cosines.argmax(1)] == digits
    found["recall_audio_image"] = digits[cosines.argmax(0)] == digits
    return {name: own.astype(float) for name, own in found.items()}


def judged(recipe: Recipe, learner: Learner, known: Coded, split: str) -> tuple[dict[str, float | None], Right, Right]:
    """Returns the figures of a split in 100, which rows are right by figure, and the medium that each row shows."""
    held_out, game = codes_of_split(recipe, learner, split), learner.heads["codes"].game
    right, asked = right_answers(known, held_out), held_out.digits != ""
    found = {
        "player": None if game is None else told_apart(game.discriminator, held_out.codes),
        "fresh": told_apart(fresh(known.codes), held_out.codes),
    } | {name: float(own.mean()) for name, own in right.items()}
    groups = {name: held_out.shown["audio" if name in OF_SOUNDS else "image"][asked] for name in right}
    return {name: value if value is None else round(100 * value, 1) for name, value in found.items()}, right, groups


def run(seed: str, game: str, given: argparse.Namespace, folder: Path) -> dict[str, tuple[Right, Right]]:
    """Pretrains once and prints its figures; returns by split which rows are right by figure, and what they show."""
    off = [] if game == "with" else ["pretrain.objectives.adversarial=0"]
    sources = [own for own in load_recipe(RECIPE).model_dump(mode="json")["sources"] if own["split"] == "train"]
    for split in given.held_out.split(","):
        sources += held_out_sources(split, folder / "media" / split)
    changes = [*given.set, *off, f"run_dir={folder}", f"seed={seed}", f"sources={json.dumps(sources)}"]
    changes.append(f"eval.split={given.held_out.split(',')[0]}")  # nothing is scored by it, but it must be there
    recipe, quiet = load_recipe(RECIPE, changes), Talk(quiet=True)
    build_data(recipe, console=quiet)
    stages, started = pretrain_stages(recipe, None, "never", True), time.process_time()
    run_stages(recipe, stages, force=False, dry_run=False, console=quiet)
    seconds = round(time.process_time() - started)
    learner = load_heads(load_model(str(recipe.run_dir / "base")), recipe.run_dir / "base")
    known, found = codes_of_split(recipe, learner, "train"), {}
    for split in given.held_out.split(","):
        figures, *found[split] = judged(recipe, learner, known, split)
        line = {"game": game, "seed": int(seed), "rows": split, **figures, "cpu_seconds": seconds}
        print(json.dumps(line), flush=True)
    return found


def difference(name: str, pairs: list[tuple[Right, Right]], groups: np.ndarray) -> list[float]:
    """Returns the first runs' score less the second's over all seeds, in 100, and its interval of 95 of 100."""
    first, second = (np.concatenate([pair[side][name] for pair in pairs]) for side in range(2))
    made = paired_difference(second, first, groups=list(np.tile(groups, len(pairs))))
    return [round(100 * value, 1) for value in (made.value, made.low, made.high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--games", default="with,without")
    parser.add_argument("--held-out", default="test", help="test, val or test,val; settings are chosen by val")
    parser.add_argument("--set", action="append", default=[], help="override a key of the recipe")
    given, games = parser.parse_args(), {}
    for seed in given.seeds.split(","):
        for game in given.games.split(","):
            with tempfile.TemporaryDirectory() as folder:
                games.setdefault(game, []).append(run(seed, game, given, Path(folder)))
    if len(games) == 2:
        for split in given.held_out.split(","):
            pairs = [(one[split][0], other[split][0]) for one, other in zip(*games.values(), strict=True)]
            groups = next(iter(games.values()))[0][split][1]
            print(json.dumps({"difference": split} | {name: difference(name, pairs, groups[name]) for name in groups}))


if __name__ == "__main__":
    main()
