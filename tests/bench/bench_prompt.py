"""Prompt search against random search at equal calls, over seeds, on the bundled comparison that the base never learnt.

    python tests/bench/bench_prompt.py [--methods ape,opro,mipro,gepa] [--seeds 5] [--first-seed 0] [--budget 1500]

One line per method: mean score of the start, of the best prompt and of random search's best on test rows that nothing
was chosen by, the difference to random search with its standard deviation over the seeds, and how many seeds were
better, worse and equal by a paired test of the rows.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mmtune.recipe.text import load_recipe  # noqa: E402
from mmtune.stages.build_data import build_data  # noqa: E402
from mmtune.stages.prompt import prompt  # noqa: E402
from mmtune.talk import Talk  # noqa: E402


def clear(found: dict) -> int:
    """Returns 1 where a difference is clearly above zero, -1 where it is below, else 0."""
    if found["p"] >= 0.05 or found["low"] <= 0 <= found["high"]:
        return 0
    return 1 if found["value"] > 0 else -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=str(ROOT / "recipes" / "prompt_blackbox.yaml"))
    parser.add_argument("--methods", default="ape,opro,mipro,gepa")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=1500)
    parser.add_argument("--set", action="append", default=[], help="override a key of the recipe")
    given = parser.parse_args()
    quiet = Talk(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        for method in given.methods.split(","):
            results, started = [], time.monotonic()
            for seed in range(given.first_seed, given.first_seed + given.seeds):
                changes = [f"run_dir={folder}", f"prompt.method={method}", f"prompt.budget={given.budget}"]
                recipe = load_recipe(Path(given.recipe), [*changes, *given.set])
                build_data(recipe, console=quiet)
                prompt(recipe.model_copy(update={"seed": seed}), resume="never", console=quiet)
                results.append(json.loads((Path(folder) / "prompt" / "prompt.json").read_text("utf-8")))
                print(method, seed, _brief(results[-1]), file=sys.stderr, flush=True)
            print(json.dumps(_summary(method, results, time.monotonic() - started)), flush=True)


def _brief(found: dict) -> str:
    scores = {name: (one["dev"]["value"], one["test"]["value"]) for name, one in found["scores"].items()}
    return f"{scores} {found['calls']} {found['prompt']['instruction']!r}"


def _summary(method: str, results: list[dict], seconds: float) -> dict:
    def test(name: str) -> list[float]:
        return [one["scores"][name]["test"]["value"] for one in results]

    gains = [best - other for best, other in zip(test("best"), test("random"), strict=True)]
    judged = {
        name: [clear(one["differences"][f"best - {name}"]["test"]) for one in results] for name in ("start", "random")
    }
    return {
        "method": method,
        "seeds": len(results),
        "calls": [one["calls"]["search"] for one in results],
        "start": round(statistics.mean(test("start")), 2),
        "best": round(statistics.mean(test("best")), 2),
        "random": round(statistics.mean(test("random")), 2),
        "dev": round(statistics.mean(one["scores"]["best"]["dev"]["value"] for one in results), 2),
        "random_dev": round(statistics.mean(one["scores"]["random"]["dev"]["value"] for one in results), 2),
        "best_less_random": round(statistics.mean(gains), 2),
        "deviation": round(statistics.stdev(gains), 2) if len(gains) > 1 else 0.0,
        **{f"against_{name}": [judged[name].count(mark) for mark in (1, -1, 0)] for name in judged},
        "seconds": round(seconds),
    }


if __name__ == "__main__":
    main()
