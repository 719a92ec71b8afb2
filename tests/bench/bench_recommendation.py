"""What a history of items is worth to a composite model, on real users who are held out of training, by `mmtune run`.

    python tests/bench/bench_recommendation.py --data DIR      # a folder of MovieLens, with movies.csv and ratings.csv

"From which decade is the film that the user chooses next?" The model is shown the last 20 films as items, their ids
alone: that a film has a decade is for it to find out from what users chose after it. One in five users is held out.
Beside it stand the commonest decade, and two rules that are told the films' years: the decade of the last film, and the
commonest decade of the history. Right answers in 100 of the held-out rows.

A copy of ratings.csv may lack the users: its rows stand user by user, and one begins where the films' ids fall.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LONGEST, SHORTEST, HELD_OUT = 20, 5, 5
LAST_SECOND = 10**10
QUESTION = "From which decade is the film that the user chooses next?"


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


def decades_of(folder: Path) -> dict[str, str]:
    """Returns the decade of every film whose title ends with a year."""
    with open(folder / "movies.csv", newline="", encoding="utf-8") as handle:
        found = {row[0]: re.search(r"\((\d{3})\d\)\s*$", row[1]) for row in csv.reader(handle)}
    return {film: f"{year[1]}0s" for film, year in found.items() if year}


def rows_of(users: list[list[str]], decades: dict[str, str], split: str, per_user: int) -> Iterator[dict[str, Any]]:
    """Yields rows of the users of a split."""
    for number, own in enumerate(users):
        places = [at for at in range(SHORTEST, len(own)) if own[at] in decades]
        if (number % HELD_OUT == 0) == (split == "test"):
            draw = random.Random(f"{split} {number}")
            for at in draw.sample(places, min(per_user, len(places))):
                past, answer = own[max(0, at - LONGEST) : at], decades[own[at]]
                yield {"id": f"{number}_{at}", "past": past, "question": QUESTION, "answer": answer}


def by_rule(rows: list[dict[str, Any]], decades: dict[str, str]) -> dict[str, float]:
    """Returns right answers in 100 of the rules."""
    commonest = Counter(row["answer"] for row in rows).most_common(1)[0][0]
    told = [[decades.get(film, commonest) for film in row["past"]] for row in rows]
    said = {
        "commonest": [commonest] * len(rows),
        "last film": [own[-1] for own in told],
        "commonest of the history": [Counter(own).most_common(1)[0][0] for own in told],
    }
    answers = [row["answer"] for row in rows]
    return {name: round(100 * sum(map(str.__eq__, own, answers)) / len(answers), 1) for name, own in said.items()}


def recipe_of(given: argparse.Namespace, data: Path, run_dir: Path) -> dict[str, Any]:
    """Returns the recipe."""
    columns = {"id": "id", "question": "question", "answer": "answer", "behaviour": "past"}
    same = {"id": "films", "reader": "table", "columns": columns, "task": "recommendation", "template": "vqa_plain"}
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "window": LONGEST}
    return {
        "run_dir": str(run_dir),
        "seed": given.seed,
        "sources": [{**same, "split": split, "path": str(data / f"{split}.jsonl")} for split in ("train", "test")],
        "tokenize": {"max_length": 256, "layout": "rows"},
        "pretrain": {
            "build": {"text": str(ROOT / "data" / "base"), "encoders": {"behaviour": tower}},
            "max_steps": given.steps,
            "batch_rows": given.batch_rows,
            "learning_rate": given.rate,
            "save_every": 10_000,
        },
        "eval": {"split": "test", "compare": ["base"], "ablate": ["modality"], "max_new_tokens": 6, "batch_rows": 128},
    }


def run(given: argparse.Namespace, data: Path, folder: Path) -> dict[str, Any]:
    """Returns right answers in 100 with and without the history, and the processor time of the whole run."""
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe_of(given, data, folder / "run")), "utf-8")
    subprocess.run([sys.executable, "-m", "mmtune", "run", str(path), "--offline", "--quiet"], check=True, cwd=ROOT)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = json.loads((folder / "run" / "report" / "metrics.json").read_text("utf-8"))
    without = next(one for one in report["ablation"]["entries"] if one["name"] == "without behaviour")
    found = {"model": report["metrics"], "model without its history": without["metrics"]}
    said = {}
    for (name, metrics), label in zip(found.items(), ("base", "without behaviour"), strict=True):
        score = metrics["accuracy"]["models"][label]
        said[name] = {key: round(score[key], 1) for key in ("value", "low", "high")}
    return {**said, "processor_seconds": round(spent.ru_utime + spent.ru_stime)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of MovieLens")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--batch-rows", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-rows", type=int, default=40, help="of each user")
    parser.add_argument("--test-rows", type=int, default=10, help="of each user who is held out")
    parser.add_argument("--out", type=Path, help="where the run stays; left out: nowhere")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.out or Path(temporary)
        data = folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        users, decades = users_of(given.data), decades_of(given.data)
        for split, per_user in (("train", given.train_rows), ("test", given.test_rows)):
            rows = list(rows_of(users, decades, split, per_user))
            (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        print(json.dumps({"users": len(users), "rows": len(rows), **by_rule(rows, decades)}), flush=True)
        print(json.dumps(run(given, data, folder)), flush=True)


if __name__ == "__main__":
    main()
