"""What a history of items is worth to a composite model, on real users who are held out of training, by `mmtune run`.

    python tests/bench/bench_recommendation.py --data DIR      # a folder of MovieLens, with movies.csv and ratings.csv

Each row shows a user's history and one film, both as items: "Will the user choose TITLE next?" It is the film that the
user rated next, or one that the user never rated, drawn from all ratings so that it is as popular on average. One in
five users is held out. Three models learn from the same rows: with the history and the film, with the film alone, and
with words alone. Beside them stand two ways without a language model: films that were rated more often, and films that
were rated by those who rated the history (cosine of the columns of the training users' ratings); both cut at the median
of their scores. A line per model: right answers in 100 of the held-out rows.

A copy of ratings.csv may lack the users: its rows stand user by user, and one begins where the films' ids fall.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
LONGEST, SHORTEST, HELD_OUT = 20, 5, 5
LAST_SECOND = 10**10
MODELS = {"history and film": ["past", "film"], "film": ["film"], "words": []}


def users_of(folder: Path) -> list[list[str]]:
    """Returns the films that each user rated, in the order of time."""
    users: list[list[tuple[int, str]]] = []
    before = ("", -1)
    with open(folder / "ratings.csv", newline="", encoding="utf-8") as handle:
        for row in csv.reader(handle):
            if not row[0].isdigit() or int(row[-1]) > LAST_SECOND:
                continue
            user, film = (row[0] if len(row) > 3 else ""), int(row[-3])
            if not users or user != before[0] or (not user and film < before[1]):
                users.append([])
            if (user, film) != before:
                users[-1].append((int(row[-1]), str(film)))
            before = (user, film)
    return [[film for _, film in sorted(own, key=lambda rated: rated[0])] for own in users]


def titles_of(folder: Path) -> dict[str, str]:
    """Returns every film's title."""
    with open(folder / "movies.csv", newline="", encoding="utf-8") as handle:
        return {row[0]: row[1] for row in csv.reader(handle) if row[0].isdigit()}


def rows_of(users: list[list[str]], titles: dict[str, str], split: str, per_user: int) -> Iterator[dict[str, Any]]:
    """Yields rows of the users of a split, as many with yes as with no."""
    rated = [film for own in users for film in own]
    for number, own in enumerate(users):
        if (number % HELD_OUT == 0) != (split == "test") or len(own) <= SHORTEST:
            continue
        draw = random.Random(f"{split} {number}")
        places = draw.sample(range(SHORTEST, len(own)), min(per_user, len(own) - SHORTEST))
        for turn, at in enumerate(places):
            chosen = turn % 2 == 0
            film = own[at]
            while not chosen and film in own:
                film = draw.choice(rated)
            yield {
                "id": f"{number}_{at}",
                "past": own[max(0, at - LONGEST) : at],
                "film": [film],
                "question": f"Will the user choose {titles.get(film, film)} next?",
                "answer": "yes" if chosen else "no",
            }


def right(scores: np.ndarray, rows: list[dict[str, Any]]) -> float:
    """Returns right answers in 100 where the higher half of the scores says yes."""
    yes = np.array([row["answer"] == "yes" for row in rows])
    return round(100 * float(((scores > np.median(scores)) == yes).mean()), 1)


def without_a_model(users: list[list[str]], rows: list[dict[str, Any]]) -> dict[str, float]:
    """Returns right answers in 100 by popularity and by the users that films share."""
    train = [own for number, own in enumerate(users) if number % HELD_OUT]
    place = {film: at for at, film in enumerate(sorted({film for own in users for film in own}))}
    rated = np.zeros((len(train), len(place)), np.float32)
    for row, own in zip(rated, train, strict=True):
        row[[place[film] for film in own]] = 1
    lengths = np.linalg.norm(rated, axis=0) + 1e-6
    popular, shared = [], []
    for row in rows:
        film, past = place[row["film"][0]], [place[one] for one in row["past"]]
        popular.append(lengths[film])
        shared.append(float((rated[:, past] / lengths[past]).sum(1) @ (rated[:, film] / lengths[film])))
    return {"popularity": right(np.array(popular), rows), "shared users": right(np.array(shared), rows)}


def recipe_of(shown: list[str], given: argparse.Namespace, data: Path, run_dir: Path) -> dict[str, Any]:
    """Returns the recipe of a model that is shown some columns as histories."""
    columns = {"id": "id", "question": "question", "answer": "answer"} | ({"behaviour": shown} if shown else {})
    same = {"id": "films", "reader": "table", "columns": columns, "task": "recommendation", "template": "vqa_plain"}
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "window": LONGEST}
    return {
        "run_dir": str(run_dir),
        "seed": given.seed,
        "sources": [{**same, "split": split, "path": str(data / f"{split}.jsonl")} for split in ("train", "test")],
        "tokenize": {"max_length": 256, "layout": "rows"},
        "pretrain": {
            "build": {
                "text": str(ROOT / "data" / "base"),
                "encoders": {"behaviour": tower} if shown else {"image": str(ROOT / "data" / "base")},
            },
            "max_steps": given.steps,
            "batch_rows": given.batch_rows,
            "learning_rate": given.rate,
            "tower_rates": {"behaviour": given.tower_rate} if shown else {},
            "save_every": 10_000,
        },
        "eval": {"split": "test", "compare": ["base"], "max_new_tokens": 2, "batch_rows": 128},
    }


def run(name: str, given: argparse.Namespace, data: Path, folder: Path) -> dict[str, Any]:
    """Returns right answers in 100 with their interval, and the seconds of processor time of the whole run."""
    run_dir = folder / name.replace(" ", "_")
    path = folder / f"{run_dir.name}.yaml"
    path.write_text(json.dumps(recipe_of(MODELS[name], given, data, run_dir)), "utf-8")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "mmtune", "run", str(path), "--offline", "--quiet"], check=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    report = json.loads((run_dir / "report" / "metrics.json").read_text("utf-8"))
    found = report["metrics"]["accuracy"]["models"]["base"]
    said = {key: round(found[key], 1) for key in ("value", "low", "high")}
    return {"model": name, **said, "processor_seconds": round(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of MovieLens")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--tower-rate", type=float, default=1e-2, help="of the encoder of histories")
    parser.add_argument("--batch-rows", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-rows", type=int, default=40, help="of each user")
    parser.add_argument("--test-rows", type=int, default=10, help="of each user who is held out")
    parser.add_argument("--out", type=Path, help="where the runs stay; left out: nowhere")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.out or Path(temporary)
        data = folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        users, titles = users_of(given.data), titles_of(given.data)
        for split, per_user in (("train", given.train_rows), ("test", given.test_rows)):
            rows = list(rows_of(users, titles, split, per_user))
            (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        print(json.dumps({"users": len(users), "rows": len(rows), **without_a_model(users, rows)}), flush=True)
        for name in filter(None, given.models.split(",")):
            print(json.dumps(run(name, given, data, folder)), flush=True)


if __name__ == "__main__":
    main()
